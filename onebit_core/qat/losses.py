"""What a student learns from its teacher: the next token's distribution, and where hidden states point.

    L = mean over tokens  KL(softmax(teacher) || softmax(student))
      + alpha * sum over blocks  mean over tokens  |h_teacher / |h_teacher| - h_student / |h_student||^2

KL differs from the soft-target cross-entropy by the teacher's entropy, so gradients are the same, and zero means equal.
Hidden states are those that blocks read, the first block's excepted, for they are the embedding's and cannot differ.

Source: OneBit, arXiv:2402.11295, section 3.4. Where we differ: both terms are means over tokens; the published code
adds the first up over positions and multiplies by 0.01.

Shape suffixes: N = positions of all windows, D = hidden size, V = vocabulary, B = windows, T = tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.model.head import Head, summed_divergence

POSITIONS_AT_ONCE = 512
"""So many positions' logits are in memory together: of 128,000 words, and in float32, 256 MiB."""

SummedLoss = Callable[[Tensor, slice], Tensor]
"""(states of a slice of positions, which slice) to the sum of their losses."""


def hidden_loss(student_BTD: Sequence[Tensor], teacher_BTD: Sequence[Tensor]) -> Tensor:
    """Return the loss of hidden states, added up over blocks.

    Args:
        student_BTD: what every block read, floating.
        teacher_BTD: the same of the teacher.
    """
    losses = [
        (nn.functional.normalize(found.float(), dim=-1) - nn.functional.normalize(wanted.float(), dim=-1))
        .square()
        .sum(-1)
        .mean()
        for found, wanted in zip(student_BTD[1:], teacher_BTD[1:], strict=True)
    ]
    return torch.stack(losses).sum() if losses else student_BTD[0].new_zeros(())


def logit_loss(states_ND: Tensor, wanted_ND: Tensor, heads: tuple[Head, Head]) -> Tensor:
    """Return the mean KL over positions, in nats.

    Args:
        states_ND: the student's last hidden states, with gradients.
        wanted_ND: the teacher's.
        heads: of student and teacher; neither has parameters that learn.
    """
    head, teacher_head = heads

    def divergence(part_ND: Tensor, places: slice) -> Tensor:
        with torch.no_grad():
            wanted_NV = teacher_head(wanted_ND[places])
        return summed_divergence(head(part_ND), wanted_NV)

    return _mean_in_slices(states_ND, divergence)


def next_token_loss(states_BTD: Tensor, ids_BT: Tensor, head: Head) -> Tensor:
    """Return the mean cross-entropy of every next token, in nats.

    Args:
        states_BTD: last hidden states, with gradients.
        ids_BT: int64, the text itself.
        head: without parameters that learn.
    """
    next_N = ids_BT[:, 1:].flatten()

    def cross_entropy(part_ND: Tensor, places: slice) -> Tensor:
        return nn.functional.cross_entropy(head(part_ND).float(), next_N[places], reduction="sum")

    return _mean_in_slices(states_BTD[:, :-1].flatten(0, 1), cross_entropy)


def _mean_in_slices(states_ND: Tensor, summed: SummedLoss) -> Tensor:
    """Return the mean over positions of a loss that is added up slice by slice."""
    loss: Tensor = _InSlices.apply(states_ND, summed)  # type: ignore[no-untyped-call]  # torch's
    return loss


class _InSlices(torch.autograd.Function):
    """A loss and its gradient in one pass over slices of positions, so that no window's logits are kept."""

    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, summed: SummedLoss) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=states_ND.device)
        gradients: list[Tensor] = []
        for start in range(0, len(states_ND), POSITIONS_AT_ONCE):
            places = slice(start, start + POSITIONS_AT_ONCE)
            if not ctx.needs_input_grad[0]:
                total += summed(states_ND[places], places)
                continue
            with torch.enable_grad():
                leaf_ND = states_ND[places].detach().requires_grad_()
                loss = summed(leaf_ND, places)
            gradients += torch.autograd.grad(loss, leaf_ND)
            total += loss.detach()
        if gradients:
            ctx.save_for_backward(torch.cat(gradients).div_(len(states_ND)))
        return (total / len(states_ND)).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradient.to(gradient_ND.dtype), None

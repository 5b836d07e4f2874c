"""Student and teacher side by side: one run of each over a batch of windows gives the losses.

Shape suffixes: B = windows, T = tokens, N = B * T, D = hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onebit_core.model.blocks import blocks_of, layout_of
from onebit_core.model.head import Head, find_head
from onebit_core.model.stand_ins import watched
from onebit_core.qat.losses import hidden_loss, logit_loss


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of one batch.

    Attributes:
        logits: mean KL per token, in nats.
        hidden: of hidden states, added up over blocks; zero where it is not asked for.
    """

    logits: Tensor
    hidden: Tensor


class Runner:
    """A model that gives its last hidden states, what its blocks read, and the head that makes logits of them."""

    def __init__(self, model: PreTrainedModel, probe_T: Tensor, *, recompute: bool = False) -> None:
        self.model, self.recompute = model, recompute
        self.blocks: nn.ModuleList = blocks_of(model, layout_of(type(model).__name__))
        self._head = find_head(model, probe_T)

    @property
    def head(self) -> Head:
        """States to logits; where a model has no head of its own, `states` are logits already."""
        return (lambda states: states) if self._head is None else self._head

    def __call__(self, ids_BT: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last hidden states [N, D], or logits [N, V], and every block's input [B, T, D]."""
        ids_BT = ids_BT.to(self.model.device)
        with watched(self.blocks, recompute=self.recompute and torch.is_grad_enabled()) as seen:
            if self._head is None:
                states: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
            else:
                states = self.model.base_model(input_ids=ids_BT, use_cache=False)[0]
        return states.flatten(0, 1), seen


class Distillation:
    """A student with latents in the places of its layers, and the original it learns from."""

    quantity: ClassVar[str] = "kl"
    """What `logits` of the losses is, in curves and progress."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        probe_T: Tensor,
        *,
        dtype: torch.dtype,
        recompute: bool,
    ) -> None:
        self.student = Runner(student, probe_T, recompute=recompute)
        self.teacher = Runner(teacher, probe_T)
        self.dtype = dtype

    def losses(self, ids_BT: Tensor, *, hidden: bool) -> Losses:
        """Run both on windows, int64; gradients lead to the student's latents where they are enabled."""
        with mixed_precision(self.student.model.device, self.dtype):
            with torch.no_grad():
                wanted_ND, teacher_seen = self.teacher(ids_BT)
            states_ND, seen = self.student(ids_BT)
            logits = logit_loss(states_ND, wanted_ND, (self.student.head, self.teacher.head))
            inputs = hidden_loss(seen, teacher_seen) if hidden else logits.new_zeros(())
        return Losses(logits=logits, hidden=inputs)

    @torch.no_grad()
    def mean_loss(self, ids_BT: Tensor) -> float:
        """Return the mean KL per token over windows that are run at once, in nats."""
        return float(self.losses(ids_BT, hidden=False).logits)


@contextmanager
def mixed_precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let products run in a dtype; sums, norms and softmaxes stay in float32."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
        yield

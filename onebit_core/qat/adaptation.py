"""Learning a text: the next token's cross-entropy, without a teacher.

    L = mean over tokens  -log p(x_t | x_<t)

What adapters minimize: a user's text says what the model shall say, and its original does not know it any better.
Source: PEQA, arXiv:2305.14152, section 3.2.

Shape suffixes: B = windows, S = windows of a set, T = tokens.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onebit_core.qat.distillation import Losses, Runner, mixed_precision
from onebit_core.qat.losses import next_token_loss


class Adaptation:
    """A quantized model, of which some parameters learn a text."""

    quantity: ClassVar[str] = "loss"

    def __init__(self, model: PreTrainedModel, probe_T: Tensor, *, dtype: torch.dtype, recompute: bool) -> None:
        self.runner, self.dtype = Runner(model, probe_T, recompute=recompute), dtype

    def losses(self, ids_BT: Tensor, *, hidden: bool) -> Losses:
        """Run the model on windows, int64; there is no loss of hidden states."""
        del hidden
        with mixed_precision(self.runner.model.device, self.dtype):
            states_ND, _ = self.runner(ids_BT)
            states_BTD = states_ND.view(*ids_BT.shape, -1)
            loss = next_token_loss(states_BTD, ids_BT.to(states_BTD.device), self.runner.head)
        return Losses(logits=loss, hidden=loss.new_zeros(()))

    @torch.no_grad()
    def mean_loss(self, windows_ST: Tensor, at_once: int, check: Callable[[], None] = lambda: None) -> float:
        """Return the mean loss per token over windows, in nats; `check` is called before each run and may raise."""
        total = 0.0
        for part_BT in windows_ST.split(at_once):
            check()
            total += float(self.losses(part_BT, hidden=False).logits) * len(part_BT)
        return total / len(windows_ST)

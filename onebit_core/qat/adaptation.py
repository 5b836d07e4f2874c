"""Learning a text: the next token's cross-entropy, without a teacher.

    L = mean over tokens  -log p(x_t | x_<t)

What adapters minimize: a user's text says what the model shall say, and its original does not know it any better.
Source: PEQA, arXiv:2305.14152, section 3.2.

Shape suffixes: B = windows, T = tokens.
"""

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
    def mean_loss(self, ids_BT: Tensor) -> float:
        """Return the mean loss per token over windows that are run at once, in nats."""
        return float(self.losses(ids_BT, hidden=False).logits)

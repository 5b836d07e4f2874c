"""The logits of one window, or of a batch of sequences, a few positions at a time.

Logits of a whole window are the largest tensor of an evaluation: 2048 positions of a 128,000-word vocabulary
are 1 GiB in float32. So the decoder runs once over the window, its hidden states are kept (they are small), and
the head is applied to a slice of positions whenever one is asked for.

Where an architecture does something to the logits that cannot be done to a slice of them (onebit_core.model.head), a
reader falls back to the model's own complete logits, which costs memory but is always right.

Shape suffixes: B = sequences, T = positions, V = vocabulary, H = hidden size, N = chosen positions.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onebit_core.model.head import find_head


class LogitsReader:
    """Runs a causal language model over windows and gives its logits in slices, in float32."""

    def __init__(self, model: PreTrainedModel, probe_T: Tensor) -> None:
        """Find out how the model makes logits.

        Args:
            model: in evaluation mode.
            probe_T: int64 token ids to try it on.
        """
        self._model = model
        self._head = find_head(model, probe_T)
        self._states_TH: Tensor = torch.empty(0)

    @property
    def keeps_logits(self) -> bool:
        """Whether a window's logits are kept whole, because the model has no head that can be applied to a slice."""
        return self._head is None

    @torch.inference_mode()
    def start(self, tokens_T: Tensor) -> None:
        """Run the model over one window of int64 token ids; `read` then answers for this window."""
        self.start_batch(tokens_T[None])

    @torch.inference_mode()
    def start_batch(self, tokens_BT: Tensor) -> None:
        """Run the model over sequences side by side; `read_at` then answers for position b * T + t of sequence b.

        Shorter sequences are filled up at their end with any token: a causal model does not look ahead.
        """
        tokens_BT = tokens_BT.to(self._model.device)
        self._states_TH = torch.empty(0)  # those of before need not be in memory beside the new ones
        if self._head is None:
            states_BTH = self._model(input_ids=tokens_BT, use_cache=False).logits
        else:
            states_BTH = self._model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        self._states_TH = states_BTH.flatten(0, 1)

    @torch.inference_mode()
    def read(self, start: int, stop: int) -> Tensor:
        """Return the float32 logits [stop - start, V] of some positions of the window."""
        return self._logits(self._states_TH[start:stop])

    @torch.inference_mode()
    def read_at(self, positions_N: Tensor) -> Tensor:
        """Return the float32 logits [N, V] at some positions of the batch."""
        return self._logits(self._states_TH[positions_N.to(self._states_TH.device)])

    def _logits(self, states: Tensor) -> Tensor:
        """Apply the head, unless the model's own logits are what was kept."""
        return (states if self._head is None else self._head(states)).float()

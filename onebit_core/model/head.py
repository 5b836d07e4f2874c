"""From hidden states to logits, and how far two models' logits are apart.

Usually logits are the head applied to the decoder's last hidden state. Some architectures do something to them after
that (Gemma caps them, Granite and Cohere scale them). Rather than keep a list of those, ways are tried on a few tokens:

    the head alone
    the whole model, with the states in its decoder's place: whatever it does to logits, it does to a slice of them
    neither: logits are what the model gives for whole windows

Shape suffixes: T = positions, N = positions of all windows, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

PROBE_TOKENS = 8

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]."""


class _GivenStates(nn.Module):
    """Stands in the decoder's place, and gives states that are known."""

    def __init__(self, decoder: nn.Module, states_1ND: Tensor) -> None:
        super().__init__()
        self.__dict__["decoder"] = decoder
        self.states_1ND = states_1ND

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args: object, **kwargs: object) -> BaseModelOutputWithPast:
        """Return them, whatever comes in."""
        del args, kwargs
        return BaseModelOutputWithPast(last_hidden_state=self.states_1ND)


class _WholeModel:
    """A model as the head of its own decoder's states."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, states_ND: Tensor) -> Tensor:
        """Return the logits [N, V] of states [N, D]."""
        model, name = self._model, self._model.base_model_prefix
        decoder = model.base_model
        setattr(model, name, _GivenStates(decoder, states_ND[None]))
        try:
            ids_1N = torch.zeros(1, len(states_ND), dtype=torch.int64, device=states_ND.device)
            logits: Tensor = model(input_ids=ids_1N, use_cache=False).logits[0]
        finally:
            setattr(model, name, decoder)
        return logits


@torch.no_grad()  # in inference mode a model that is spread would gather its blocks into tensors that cannot learn
def find_head(model: PreTrainedModel, tokens_T: Tensor) -> Head | None:
    """Return what makes logits of the decoder's last hidden states, position by position; None if nothing does.

    Args:
        model: in evaluation mode.
        tokens_T: int64 token ids to try it on; the first PROBE_TOKENS are enough.
    """
    tokens_T = tokens_T[:PROBE_TOKENS].to(model.device)
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    complete_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]
    states_TD = model.base_model(input_ids=tokens_T[None], use_cache=False)[0][0]
    for way in (head, _WholeModel(model)):
        try:
            found_TV = way(states_TD)
        except Exception:  # noqa: BLE001  (a model that asks more of its decoder than states)
            continue
        if found_TV.shape == complete_TV.shape and torch.equal(found_TV, complete_TV):
            return way
    return None


def summed_divergence(found_NV: Tensor, wanted_NV: Tensor) -> Tensor:
    """Return the sum over positions of KL(softmax(wanted) || softmax(found)), in nats, float32."""
    return nn.functional.kl_div(
        found_NV.float().log_softmax(-1), wanted_NV.float().log_softmax(-1), reduction="sum", log_target=True
    )

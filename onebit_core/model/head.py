"""From hidden states to logits, and how far two models' logits are apart.

Usually logits are the head applied to the decoder's last hidden state. Some architectures do something to them after
that (Gemma caps them, Granite and Cohere scale them). Rather than keep a list of those, both ways are tried on a few
tokens.

Shape suffixes: T = positions, N = positions of all windows, V = vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_TOKENS = 8


@torch.no_grad()  # in inference mode a model that is spread would gather its blocks into tensors that cannot learn
def plain_head(model: PreTrainedModel, tokens_T: Tensor) -> nn.Module | None:
    """Return the head, if the logits are the head of the decoder's last hidden state and nothing else.

    Args:
        model: in evaluation mode.
        tokens_T: int64 token ids to try it on; the first PROBE_TOKENS are enough.
    """
    tokens_T = tokens_T[:PROBE_TOKENS].to(model.device)
    head: nn.Module | None = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    complete = model(input_ids=tokens_T[None], use_cache=False).logits
    states = model.base_model(input_ids=tokens_T[None], use_cache=False)[0]
    in_two_steps = head(states)
    same = in_two_steps.shape == complete.shape and torch.equal(in_two_steps, complete)
    return head if same else None


def summed_divergence(found_NV: Tensor, wanted_NV: Tensor) -> Tensor:
    """Return the sum over positions of KL(softmax(wanted) || softmax(found)), in nats, float32."""
    return nn.functional.kl_div(
        found_NV.float().log_softmax(-1), wanted_NV.float().log_softmax(-1), reduction="sum", log_target=True
    )

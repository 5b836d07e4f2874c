"""What transformers' own generate() continues a prompt with: what the engine's greedy tokens are held against."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel


def generated(model: PreTrainedModel, prompt: Sequence[int], num_new: int, **options) -> list[int]:
    """Return up to `num_new` greedy tokens; `options` go to generate()."""
    ids = torch.tensor([list(prompt)], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, pad_token_id=0, **options
    )
    return output[0, len(prompt) :].tolist()

"""Lets a model continue the golden prompts, greedily and side by side, and notes how probable each token was.

Shape suffixes: B = prompts, T = positions, V = vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onebit_core.artifact.golden import GoldenPrompt, GoldenPrompts

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n    return",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "It was late in the evening when the ship came into the harbour. The captain stood at the rail, looked at the "
    "lights of the town and said to the boy beside him:",
)
"""Prose, code and numbers; each is cut to the tokens of the shortest, so that they are computed side by side."""

LONGEST_PROMPT = 32
COMPLETION_TOKENS = 16
TOP = 8


def compute_golden(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, backend: str, tokens: int = COMPLETION_TOKENS
) -> GoldenPrompts:
    """Let a model continue the texts.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        backend: what the model's packed layers compute with, to be noted.
        tokens: how far to continue.

    Raises:
        ValueError: the model's context has no room for them, or it gives NaN.
    """
    context = getattr(model.config, "max_position_embeddings", None) or LONGEST_PROMPT + tokens
    encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    length = min(LONGEST_PROMPT, context - tokens, *map(len, encoded))
    if length < 1:
        raise ValueError(f"its context of {context} tokens has no room for {tokens} golden ones")
    prompts = [tuple(ids[:length]) for ids in encoded]
    tops = _continue(model, torch.tensor(prompts, device=model.device), tokens)
    golden = tuple(
        GoldenPrompt(
            prompt=prompt,
            completion=tuple(ids[0] for ids, _ in top),
            top_ids=tuple(ids for ids, _ in top),
            top_logprobs=tuple(logprobs for _, logprobs in top),
        )
        for prompt, top in zip(prompts, tops, strict=True)
    )
    return GoldenPrompts(prompts=golden, dtype=str(model.dtype).removeprefix("torch."), backend=backend)


Top = tuple[tuple[int, ...], tuple[float, ...]]


@torch.inference_mode()
def _continue(model: PreTrainedModel, tokens_BT: Tensor, num_tokens: int) -> list[list[Top]]:
    """Continue prompts of one length side by side, each greedily."""
    tops: list[list[Top]] = [[] for _ in tokens_BT]
    past = None
    for _ in range(num_tokens):
        output = model(input_ids=tokens_BT, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logprobs_BV = F.log_softmax(output.logits[:, -1].float(), dim=-1)
        if bool(logprobs_BV.isnan().any()):
            raise ValueError("its logits are NaN")
        values, ids = logprobs_BV.topk(min(TOP, logprobs_BV.shape[-1]), dim=-1)
        for top, row_ids, row_values in zip(tops, ids.tolist(), values.tolist(), strict=True):
            top.append((tuple(row_ids), tuple(round(value, 6) for value in row_values)))
        tokens_BT = ids[:, :1]
    return tops

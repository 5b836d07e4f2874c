"""Log probabilities in OpenAI's two shapes, and those of prompts in vLLM's.

Completions have four lists side by side, chat one object a token; both can be written in pieces, for a stream. Numbers
are nats. A probability of zero has no logarithm that JSON can write; it is told as -9999, as OpenAI and vLLM do.
"""

from collections.abc import Sequence
from typing import Any

from service.api.openai.prompts import Prompt
from service.engine.types import TokenLogprobs
from service.registry.vocabulary import TextRuler, Vocabulary

LOWEST = -9999.0

Json = dict[str, Any]
Scored = Sequence[TokenLogprobs | None]


class LegacyLogprobs:
    """The four lists of /v1/completions.

    Args:
        vocabulary: of the model.
        num_top: how many of the most probable tokens to tell; the one that was drawn is told in any case.
    """

    def __init__(self, vocabulary: Vocabulary, num_top: int) -> None:
        self._vocabulary = vocabulary
        self._num_top = num_top
        self._ruler = TextRuler()
        self._lists = _no_entries()

    def add_prompt(self, prompt: Prompt, scored: Scored) -> None:
        """Take those of the prompt; nothing comes before the first token, so it has none."""
        for token_id, offset, entry in zip(prompt.token_ids, prompt.offsets, scored, strict=True):
            self._append(token_id, entry, offset)
        self._ruler = TextRuler(len(prompt.text))

    def add(self, scored: Sequence[TokenLogprobs]) -> None:
        """Take those of the next tokens."""
        for entry in scored:
            is_special = entry.token_id in self._vocabulary.special_ids  # it is not in the text
            written = b"" if is_special else self._vocabulary.bytes_of(entry.token_id)
            self._append(entry.token_id, entry, self._ruler.place(written))

    def release(self) -> Json:
        """Return what was added since the last time."""
        lists, self._lists = self._lists, _no_entries()
        return lists

    def _append(self, token_id: int, entry: TokenLogprobs | None, offset: int) -> None:
        lists = self._lists
        lists["tokens"].append(self._vocabulary.text_of(token_id))
        lists["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
        lists["top_logprobs"].append(None if entry is None else self._top(entry))
        lists["text_offset"].append(offset)

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens and the one that was drawn; of two that write the same, the more probable one."""
        told: dict[str, float] = {}
        for token_id, logprob in (*entry.top[: self._num_top], (entry.token_id, entry.logprob)):
            told.setdefault(self._vocabulary.text_of(token_id), _finite(logprob))
        return told


class ChatLogprobs:
    """The list of objects of /v1/chat/completions."""

    def __init__(self, vocabulary: Vocabulary, num_top: int) -> None:
        self._vocabulary = vocabulary
        self._num_top = num_top
        self._content: list[Json] = []

    def add(self, scored: Sequence[TokenLogprobs]) -> None:
        """Take those of the next tokens."""
        for entry in scored:
            top = [self._token(token_id, logprob) for token_id, logprob in entry.top[: self._num_top]]
            self._content.append({**self._token(entry.token_id, entry.logprob), "top_logprobs": top})

    def release(self) -> Json:
        """Return what was added since the last time."""
        content, self._content = self._content, []
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        written = self._vocabulary.bytes_of(token_id)
        return {
            "token": self._vocabulary.text_of(token_id),
            "logprob": _finite(logprob),
            "bytes": list(written) if written else None,
        }


LogprobsWriter = LegacyLogprobs | ChatLogprobs


def prompt_logprobs(scored: Scored, vocabulary: Vocabulary, num_top: int) -> list[Json | None]:
    """Write the log probabilities of a prompt as vLLM does: by token id, the token itself first."""
    return [None if entry is None else _by_token_id(entry, vocabulary, num_top) for entry in scored]


def _by_token_id(entry: TokenLogprobs, vocabulary: Vocabulary, num_top: int) -> Json:
    top = entry.top[:num_top]
    ranks = {token_id: place + 1 for place, (token_id, _) in enumerate(entry.top)}
    told = {entry.token_id: entry.logprob, **dict(top)}
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token_id),
            "decoded_token": vocabulary.text_of(token_id),
        }
        for token_id, logprob in told.items()
    }


def _no_entries() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)

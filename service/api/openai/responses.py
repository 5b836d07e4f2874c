"""From engine events to what OpenAI's clients expect: whole answers, or chunks of a stream.

A Shape knows how completions or chat completions are written; the rest is the same for both. Chunks are plain
dictionaries, because a stream makes one per token; the models in schemas.py describe them to OpenAPI, and a test
validates one against the other.
"""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.api.openai.choices import ChoiceEvent
from service.registry.served import ServedModel

Json = dict[str, Any]


class Shape(Protocol):
    """How one endpoint writes its answers."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole_choice(self, index: int, text: str, finish_reason: str) -> Json:
        """A choice of a whole answer."""

    def first_delta(self, index: int) -> Json | None:
        """A chunk's choice that opens a stream of `index`; None if nothing is sent before text."""

    def chunk_choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        """A choice of a chunk."""


class CompletionShape:
    """POST /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def whole_choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        """A choice of a whole answer; a chunk's looks the same."""
        return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}

    def first_delta(self, index: int) -> Json | None:
        """Nothing."""
        del index
        return None

    chunk_choice = whole_choice


class ChatShape:
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choice(self, index: int, text: str, finish_reason: str) -> Json:
        """A choice of a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def first_delta(self, index: int) -> Json | None:
        """The role."""
        return self._choice(index, {"role": "assistant", "content": ""}, None)

    def chunk_choice(self, index: int, text: str, finish_reason: str | None) -> Json:
        """A choice of a chunk; the last has text only if some was left."""
        return self._choice(index, {"content": text} if text else {}, finish_reason)

    def _choice(self, index: int, delta: Json, finish_reason: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


@dataclass(kw_only=True)
class Answer:
    """One answer in the making: its identity, and the tokens it has cost so far."""

    shape: Shape
    model: ServedModel
    prompt_tokens: int
    num_choices: int
    id: str = field(default="")
    created: int = field(default_factory=lambda: int(time.time()))
    _generated: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = self.id or self.shape.id_prefix + uuid.uuid4().hex

    async def whole(self, events: AsyncIterator[ChoiceEvent]) -> Json:
        """Collect every event into one answer."""
        texts = [""] * self.num_choices
        reasons = [""] * self.num_choices
        async for item in events:
            texts[item.index] += item.event.text
            self._count(item)
            if item.event.finish_reason is not None:
                reasons[item.index] = item.event.finish_reason.value
        choices = [
            self.shape.whole_choice(index, text, reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head(self.shape.whole_object), "choices": choices, "usage": self._usage()}

    async def chunks(
        self, events: AsyncIterator[ChoiceEvent], *, includes_usage: bool, repeats_usage: bool
    ) -> AsyncGenerator[Json, None]:
        """Turn every event that has text or an end into a chunk."""
        opened: set[int] = set()
        async for item in events:
            self._count(item)
            usage = self._usage() if repeats_usage else None
            if item.index not in opened:
                opened.add(item.index)
                first = self.shape.first_delta(item.index)
                if first is not None:
                    yield self._chunk([first], usage=usage, shows_usage=includes_usage)
            reason = item.event.finish_reason
            if item.event.text or reason is not None:
                choice = self.shape.chunk_choice(item.index, item.event.text, reason.value if reason else None)
                yield self._chunk([choice], usage=usage, shows_usage=includes_usage)
        if includes_usage:
            yield self._chunk([], usage=self._usage(), shows_usage=True)

    def _chunk(self, choices: list[Json], *, usage: Json | None, shows_usage: bool) -> Json:
        chunk = {**self._head(self.shape.chunk_object), "choices": choices}
        if shows_usage or usage is not None:
            chunk["usage"] = usage
        return chunk

    def _head(self, object_name: str) -> Json:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model.name,
            "system_fingerprint": f"fp_{self.model.manifest.sha256[:12]}",
        }

    def _count(self, item: ChoiceEvent) -> None:
        self._generated[item.index] = item.event.num_generated_tokens

    def _usage(self) -> Json:
        generated = sum(self._generated.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

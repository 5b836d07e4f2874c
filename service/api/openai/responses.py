"""From engine events to what OpenAI's clients expect: whole answers, or chunks of a stream.

A Shape knows how completions or chat completions are written; the rest is the same for both. Chunks are plain
dictionaries, because a stream makes one per token; the models in answers.py describe them to OpenAPI, and a test
validates one against the other.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.api.openai.choices import ChoiceEvent
from service.api.openai.logprobs import ChatLogprobs, LegacyLogprobs
from service.api.openai.planning import Plan
from service.api.openai.progress import ChoiceProgress, Part
from service.registry.served import ServedModel

Json = dict[str, Any]
WriterType = type[LegacyLogprobs] | type[ChatLogprobs]


class Shape(Protocol):
    """How one endpoint writes its answers."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    writer: WriterType

    def whole(self, parts: list[Part]) -> Json:
        """What a whole answer has besides its head and usage: choices, and what stands beside them."""

    def opening(self, index: int, prompt_extras: Json) -> Json | None:
        """What the chunk that opens a choice's stream has besides its head; None if there is no such chunk."""

    def chunk(self, part: Part) -> Json:
        """What a chunk has besides its head and usage."""


class CompletionShape:
    """POST /v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    writer: WriterType = LegacyLogprobs

    def whole(self, parts: list[Part]) -> Json:
        """The choices."""
        return {"choices": [self._choice(part) for part in parts]}

    def opening(self, index: int, prompt_extras: Json) -> Json | None:
        """Nothing; the first part has all."""
        del index, prompt_extras
        return None

    def chunk(self, part: Part) -> Json:
        """A choice, written as in a whole answer."""
        return {"choices": [self._choice(part)]}

    def _choice(self, part: Part) -> Json:
        return {
            "text": part.text,
            "index": part.index,
            "logprobs": part.logprobs,
            "finish_reason": part.finish_reason,
            **part.extras,
            **part.prompt_extras,
        }


class ChatShape:
    """POST /v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    writer: WriterType = ChatLogprobs

    def whole(self, parts: list[Part]) -> Json:
        """The choices, with messages; all have the same prompt, so its extensions stand beside them."""
        return {
            "choices": [self._choice(part, message=self._message(part)) for part in parts],
            **parts[0].prompt_extras,
        }

    def opening(self, index: int, prompt_extras: Json) -> Json | None:
        """The role, and what was asked of the prompt."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return {"choices": [choice], **prompt_extras}

    def chunk(self, part: Part) -> Json:
        """A choice, with what is new of its message; the last has text only if some was left."""
        delta: Json = {"content": part.text} if part.text else {}
        if part.calls:
            calls = enumerate(part.calls, part.num_calls_before)
            delta["tool_calls"] = [{"index": index, **call.to_dict()} for index, call in calls]
        return {"choices": [self._choice(part, delta=delta)]}

    def _message(self, part: Part) -> Json:
        message: Json = {"role": "assistant", "content": part.text, "refusal": None}
        if part.calls:
            message |= {"content": part.text or None, "tool_calls": [call.to_dict() for call in part.calls]}
        return message

    def _choice(self, part: Part, **said: Json) -> Json:
        return {
            "index": part.index,
            **said,
            "logprobs": part.logprobs,
            "finish_reason": part.finish_reason,
            **part.extras,
        }


@dataclass(kw_only=True)
class Answer:
    """One answer in the making: its identity, and its choices as far as they have come."""

    shape: Shape
    model: ServedModel
    plan: Plan
    id: str
    created: int = field(default_factory=lambda: int(time.time()))
    _draws: list[ChoiceProgress] = field(init=False)
    _identity: Json = field(init=False)

    def __post_init__(self) -> None:
        fingerprint = f"fp_{self.model.manifest.sha256[:12]}"
        self._identity = {"created": self.created, "model": self.model.served_as, "system_fingerprint": fingerprint}
        self._draws = [self._progress(index) for index in range(len(self.plan.requests))]

    @property
    def num_tokens(self) -> int:
        """What it has cost so far; nothing until a first event came."""
        return self._usage()["total_tokens"] if any(draw.num_generated for draw in self._draws) else 0

    async def whole(self, events: AsyncIterator[ChoiceEvent]) -> Json:
        """Collect every event into one answer."""
        async for item in events:
            self._draws[item.index].add(item.event)
        parts = [progress.release() for progress in self._chosen()]
        return {**self._head(self.shape.whole_object), **self.shape.whole(parts), "usage": self._usage()}

    async def chunks(
        self, events: AsyncIterator[ChoiceEvent], *, includes_usage: bool, repeats_usage: bool
    ) -> AsyncGenerator[Json, None]:
        """Turn every event that has something to show into a chunk."""
        opened: set[int] = set()
        async for item in events:
            progress = self._draws[item.index]
            progress.add(item.event)
            usage = self._usage() if repeats_usage else None
            if item.index not in opened:
                opened.add(item.index)
                opening = self.shape.opening(item.index, progress.prompt_extras)
                if opening is not None:
                    yield self._chunk(opening, usage=usage, shows_usage=includes_usage)
            if progress.has_news:
                yield self._chunk(self.shape.chunk(progress.release()), usage=usage, shows_usage=includes_usage)
        if includes_usage:
            yield self._chunk({"choices": []}, usage=self._usage(), shows_usage=True)

    def _progress(self, draw: int) -> ChoiceProgress:
        plan = self.plan
        prompt = plan.prompts[draw // plan.draws]
        shows_logprobs = plan.view.logprobs is not None
        vocabulary = self.model.vocabulary if shows_logprobs or plan.view.prompt_logprobs is not None else None
        writer = None
        if vocabulary is not None and plan.view.logprobs is not None:
            writer = self.shape.writer(vocabulary, plan.view.logprobs)
        return ChoiceProgress(draw, prompt, plan.view, writer, vocabulary)

    def _chosen(self) -> list[ChoiceProgress]:
        """The choices in the order of their indices: every draw, or of each prompt's draws the best, best first."""
        plan = self.plan
        if plan.draws == plan.n:
            return self._draws
        chosen: list[ChoiceProgress] = []
        for first in range(0, len(self._draws), plan.draws):
            draws = self._draws[first : first + plan.draws]
            chosen += sorted(draws, key=lambda progress: progress.mean_logprob, reverse=True)[: plan.n]
        for index, progress in enumerate(chosen):
            progress.index = index
        return chosen

    def _chunk(self, said: Json, *, usage: Json | None, shows_usage: bool) -> Json:
        chunk = {**self._head(self.shape.chunk_object), **said}
        if shows_usage or usage is not None:
            chunk["usage"] = usage
        return chunk

    def _head(self, object_name: str) -> Json:
        return {"id": self.id, "object": object_name, **self._identity}

    def _usage(self) -> Json:
        """Each prompt counts once; whether it was cached is what its first draw found."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.plan.prompts)
        generated = sum(progress.num_generated for progress in self._draws)
        cached = sum(progress.num_cached for progress in self._draws[:: self.plan.draws])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

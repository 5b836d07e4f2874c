"""One choice in the making: what its events have brought, and the parts of it that can be shown.

A part is everything since the last part, so a stream releases many and a whole answer one. Text may be held back (half
a character, the beginning of a stop text, a tool call that is not complete); the tokens behind it are told with the
next part, in order, so none is lost.
"""

from dataclasses import dataclass
from typing import Any

from service.api.openai.logprobs import LOWEST, LegacyLogprobs, LogprobsWriter, prompt_logprobs
from service.api.openai.planning import View
from service.api.openai.prompts import Prompt
from service.api.openai.tools import CallReader, Found, ToolCall
from service.engine.types import FinishReason, TokenEvent
from service.registry.vocabulary import Vocabulary

Json = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Part:
    """What a choice says since the last part.

    Attributes:
        index: of the choice.
        text: shown text.
        calls: tool calls that are complete; `num_calls_before` came in earlier parts.
        logprobs: in the endpoint's shape; None if not asked for.
        extras: extensions of the choice that were asked for.
        prompt_extras: extensions about the prompt, in the first part only.
        finish_reason: in the last part.
    """

    index: int
    text: str
    calls: tuple[ToolCall, ...]
    num_calls_before: int
    logprobs: Json | None
    extras: Json
    prompt_extras: Json
    finish_reason: str | None


class ChoiceProgress:
    """Collects the events of one draw.

    Args:
        index: of the choice.
        prompt: what it continues.
        view: what is to be shown.
        writer: of log probabilities; None if they are not shown.
        vocabulary: of the model, where log probabilities are shown.

    Attributes:
        prompt_extras: extensions about the prompt that were asked for, until the first part has them.
        num_generated: tokens so far.
        num_cached: tokens of the prompt that were in the prefix cache.
    """

    def __init__(
        self, index: int, prompt: Prompt, view: View, writer: LogprobsWriter | None, vocabulary: Vocabulary | None
    ) -> None:
        self.index = index
        self._prompt = prompt
        self._view = view
        self._writer = writer
        self._vocabulary = vocabulary
        self._reader: CallReader | None = view.read_calls() if view.read_calls is not None else None
        self._is_open = False
        self._text = ""
        self._calls: list[ToolCall] = []
        self._num_calls = 0
        self._token_ids: list[int] = []
        self.prompt_extras: Json = {}
        self._finish: FinishReason | None = None
        self._logprob_sum = 0.0
        self.num_generated = 0
        self.num_cached = 0

    def add(self, event: TokenEvent) -> None:
        """Take the next event."""
        if not self._is_open:
            self._is_open = True
            self._open(event)
        self.num_generated = event.num_generated_tokens
        self._token_ids.extend(event.token_ids)
        self._logprob_sum += sum(max(entry.logprob, LOWEST) for entry in event.logprobs)
        if self._writer is not None:
            self._writer.add(event.logprobs)
        self._finish = event.finish_reason
        if self._reader is None:
            self._text += event.text
            return
        self._take(self._reader.push(event.text))
        if event.finish_reason is not None:
            self._take(self._reader.flush())

    @property
    def has_news(self) -> bool:
        """Whether there is something to show now."""
        return bool(self._text or self._calls or self._finish is not None)

    @property
    def mean_logprob(self) -> float:
        """Mean log probability of the generated tokens, by which best_of ranks."""
        return self._logprob_sum / max(1, self.num_generated)

    def release(self) -> Part:
        """Return what has come since the last part."""
        part = Part(
            index=self.index,
            text=self._text,
            calls=tuple(self._calls),
            num_calls_before=self._num_calls - len(self._calls),
            logprobs=self._writer.release() if self._writer is not None else None,
            extras={"token_ids": self._token_ids} if self._view.token_ids else {},
            prompt_extras=self.prompt_extras,
            finish_reason=self._reason(),
        )
        self._text, self._calls, self._token_ids, self.prompt_extras = "", [], [], {}
        return part

    def _open(self, event: TokenEvent) -> None:
        """Take what only the first event tells: of the prompt."""
        self.num_cached = event.num_cached_tokens
        scored = event.prompt_logprobs or ()
        if self._view.echo:
            self._text = self._prompt.text
            if isinstance(self._writer, LegacyLogprobs):
                self._writer.add_prompt(self._prompt, scored)
        if self._view.token_ids:
            self.prompt_extras["prompt_token_ids"] = list(self._prompt.token_ids)
        if self._view.prompt_logprobs is not None and self._vocabulary is not None:
            told = prompt_logprobs(scored, self._vocabulary, self._view.prompt_logprobs)
            self.prompt_extras["prompt_logprobs"] = told

    def _take(self, found: list[Found]) -> None:
        for item in found:
            if isinstance(item, ToolCall):
                self._calls.append(item)
                self._num_calls += 1
            else:
                self._text += item

    def _reason(self) -> str | None:
        """The finish reason; a choice that ends by itself after calls waits for their results."""
        if self._finish is FinishReason.STOP and self._num_calls:
            return "tool_calls"
        return self._finish.value if self._finish is not None else None

"""Tool calls in a model's text, found as the text arrives.

Models of the Hermes and Qwen families write a call between tags, after some text or none, once or several times:

    Let me look.<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>

A call that a grammar forced has no tags: the whole text is a list of calls, or, where one function was named, its
arguments. What cannot be read as a call stays text, so nothing a model says is lost.
"""

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Protocol

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """One call the model asks for; `arguments` is a JSON object as text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_dict(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Found = str | ToolCall


class CallReader(Protocol):
    """Divides the text of one choice into text and calls."""

    def push(self, text: str) -> list[Found]:
        """Take the next piece; return what is decided."""

    def flush(self) -> list[Found]:
        """Return what was held back: the text has ended."""


class TaggedCalls:
    """Reads calls between tags. Space around calls is not content.

    Args:
        only_one: leave out every call but the first.
    """

    def __init__(self, *, only_one: bool) -> None:
        self._only_one = only_one
        self._held = ""
        self._is_inside = False
        self._num_calls = 0
        self._after_call = False

    def push(self, text: str) -> list[Found]:
        """Take the next piece; return what is decided."""
        self._held += text
        found: list[Found] = []
        while True:
            mark = CLOSE if self._is_inside else OPEN
            before, seen, after = self._held.partition(mark)
            if not seen:
                break
            found += self._call(before, CLOSE) if self._is_inside else self._text(before.rstrip())
            self._held, self._is_inside = after, not self._is_inside
        if not self._is_inside:
            cut = len(self._held) - _overlap(self._held, OPEN)
            cut = len(self._held[:cut].rstrip())
            found += self._text(self._held[:cut])
            self._held = self._held[cut:]
        return found

    def flush(self) -> list[Found]:
        """Return what was held back; a call whose closing tag never came is one if it can be read."""
        held, self._held = self._held, ""
        if self._is_inside:
            return self._call(held, "")
        return self._text(held.rstrip() if self._num_calls else held)

    def _text(self, text: str) -> list[Found]:
        if self._after_call:
            text = text.lstrip()
        self._after_call &= not text
        return [text] if text else []

    def _call(self, body: str, close: str) -> list[Found]:
        call = _read_call(_read_json(body))
        if call is None:
            return self._text(OPEN + body + close)
        self._num_calls += 1
        self._after_call = True
        return [] if self._only_one and self._num_calls > 1 else [call]


class ForcedCalls:
    """Reads a text that is nothing but calls.

    Args:
        name: the function whose arguments the text is; None if it is a list of calls.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._held = ""

    def push(self, text: str) -> list[Found]:
        """Hold everything back."""
        self._held += text
        return []

    def flush(self) -> list[Found]:
        """Return the calls; a text that was cut before its end is returned as it is."""
        value = _read_json(self._held)
        if self._name is not None:
            return (
                [ToolCall(name=self._name, arguments=self._held.strip())] if isinstance(value, dict) else self._text()
            )
        calls = [_read_call(item) for item in value] if isinstance(value, list) else []
        found: list[Found] = [call for call in calls if call is not None]
        return found if found and len(found) == len(calls) else self._text()

    def _text(self) -> list[Found]:
        return [self._held] if self._held else []


def _read_json(text: str) -> Any:
    """Parse JSON as the standard defines it; None if it is not."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _read_call(value: Any) -> ToolCall | None:
    """Read {"name", "arguments"}; some models say "parameters", and some write the arguments as text."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _read_json(arguments)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(name=value["name"], arguments=json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)

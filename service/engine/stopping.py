"""Stop strings over text that arrives in pieces.

A stop string ends the text and is not returned, so the end of a piece that may be the beginning of a stop string is
held back until it is decided. Of several stop strings the one that is complete first wins, and of those the one that
begins first; so the result does not depend on how the text was cut into pieces.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Watches one sequence's text for its stop strings."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held = ""

    def push(self, text: str) -> Piece:
        """Take the next piece; return what may be shown now."""
        if not self._stop:
            return Piece(text=text, stopped=False)
        self._held += text
        matches = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if matches:
            _, start = min(matches)
            shown, self._held = self._held[:start], ""
            return Piece(text=shown, stopped=True)
        cut = len(self._held) - max(_overlap(self._held, stop) for stop in self._stop)
        shown, self._held = self._held[:cut], self._held[cut:]
        return Piece(text=shown, stopped=False)

    def flush(self) -> str:
        """Return what is held: the text has ended, so no stop string can be completed."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)

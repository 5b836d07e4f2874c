"""Stop strings over text that arrives in pieces.

A stop string ends the text and is not returned, unless it was asked for. So the end of a piece that may be the
beginning of a stop string is held back until it is decided. Of several stop strings the one that is complete first
wins, and of those the one that begins first; so the result does not depend on how the text was cut into pieces.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopStrings:
    """Watches one sequence's text for its stop strings.

    Args:
        stop: the strings.
        included: whether the one that ends the text is shown.
    """

    def __init__(self, stop: tuple[str, ...], *, included: bool = False) -> None:
        self._stop = tuple(text for text in stop if text)
        self._included = included
        self._held = ""

    def push(self, text: str, *, may_end: bool = True) -> Piece:
        """Take the next piece; return what may be shown now.

        A stop string that is complete while it may not end the text passes like any other text.
        """
        if not self._stop:
            return Piece(text=text, stopped=False)
        self._held += text
        matches = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if matches and may_end:
            end, start = min(matches)
            shown, self._held = self._held[: end if self._included else start], ""
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

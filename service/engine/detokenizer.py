"""Tokens to text, piece by piece, never cutting a character.

A token may end in the middle of a character, and some decoders write a token differently at the beginning of a text. So
a window of tokens is decoded twice and the difference is the news (the method of text-generation-inference and vLLM):

    tokens    ... | context | pending |           news = decode(context + pending) - decode(context)
                  ^settled            ^end

News that ends in U+FFFD is held, for the next token may complete the character. Of a pending run too long for one
character only the end is held (at most three of them: a byte-fallback decoder writes one per missing byte), so a model
that writes broken UTF-8 cannot hold its text for ever.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4  # bytes, so tokens, of the longest UTF-8 character
LONGEST_WINDOW = 32  # pending tokens after which what is there is given out, whole or not
CONTEXT_TOKENS = 6  # of the prompt, for decoders that look at their left neighbour

Decode = Callable[[list[int]], str]


class Detokenizer:
    """The text of one sequence's generated tokens, as increments."""

    def __init__(self, decode: Decode, prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._num_context = len(self._window)
        self._shown = decode(self._window)  # text of the window that is out already

    def push(self, token_id: int) -> str:
        """Take the next token and return the characters it completes."""
        self._window.append(token_id)
        text = self._decode(self._window)
        num_pending = len(self._window) - self._num_context
        if text == self._shown and num_pending < LONGEST_WINDOW:
            return ""  # a special token; what follows still needs the same context
        if not text.endswith(REPLACEMENT) or num_pending >= LONGEST_WINDOW:
            return self._settle(text)
        if num_pending < LONGEST_CHARACTER:
            return ""
        return self._show(text[: len(text) - _held(text)])

    def flush(self) -> str:
        """Return what is held, with U+FFFD for a character that was never completed."""
        return self._settle(self._decode(self._window))

    def _settle(self, text: str) -> str:
        """Give out all of the window's text, and let its pending tokens become the next context."""
        news = self._show(text)
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._shown = self._decode(self._window)
        return news

    def _show(self, text: str) -> str:
        news = text.removeprefix(self._shown)
        if not text.startswith(self._shown):  # the token completed a character that the prompt left unfinished
            news = text[_num_equal(text, self._shown) :]
        self._shown = text
        return news


def _num_equal(text: str, other: str) -> int:
    """Return how many characters the beginnings have in common."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((index for index, (one, two) in pairs if one != two), min(len(text), len(other)))


def _held(text: str) -> int:
    """Return how many characters at the end of `text` may still change."""
    return min(len(text) - len(text.rstrip(REPLACEMENT)), LONGEST_CHARACTER - 1)

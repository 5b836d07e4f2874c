r"""What each token of a tokenizer writes: its bytes, and a text for it that JSON can carry.

A tokenizer decodes whole texts; log probabilities need single tokens, of which many are a part of a character. So the
bytes are read off the vocabulary's own notation, of which there are two:

    byte level        every byte has a printable letter (GPT-2):            "Ġthe" -> b" the",  "ðŁ" -> b"\xf0\x9f"
    byte fallback     text, with U+2581 for a space, or one byte by number:  "▁the" -> b" the", "<0xF0>" -> b"\xf0"

A token that is no UTF-8 by itself is shown as OpenAI shows it, `bytes:\xf0\x9f`; one without any text, such as the
rows a model has beyond its tokenizer, as `token_id:300`.
"""

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

SPACE_MARK = "\u2581"
BYTE_BY_NUMBER = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Spell = Callable[[str], bytes]


class Vocabulary:
    """Bytes and text of every token id.

    Attributes:
        special_ids: tokens that are left out of a completion's text, such as the end of sequence.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        spell = _spelling_of(tokenizer)
        self._bytes: list[bytes] = []
        for token_id, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
            if token_id in added:
                self._bytes.append(added[token_id].content.encode())
            elif spell is not None:
                self._bytes.append(spell(piece or ""))
            else:
                self._bytes.append(str(tokenizer.decode([token_id])).encode())

    def bytes_of(self, token_id: int) -> bytes:
        """Return what a token writes; nothing for an id beyond the tokenizer's."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def text_of(self, token_id: int) -> str:
        """Return a text for a token; different tokens have different texts wherever their bytes differ."""
        written = self.bytes_of(token_id)
        if not written:
            return f"token_id:{token_id}"
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written)


def _spelling_of(tokenizer: Any) -> Spell | None:
    """Return how the tokenizer's pieces are spelled; None if only decoding tells."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    notation = json.dumps(json.loads(decoder.__getstate__()))
    if '"ByteLevel"' in notation:
        return _spell_byte_level
    if '"ByteFallback"' in notation or '"Metaspace"' in notation:
        return _spell_byte_fallback
    return None


def _byte_letters() -> dict[str, int]:
    """Return the byte behind each letter of GPT-2's alphabet: printable ones are themselves, others count from 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in letters.values()]
    return letters | {chr(256 + position): byte for position, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()


def _spell_byte_level(piece: str) -> bytes:
    if all(letter in BYTE_OF_LETTER for letter in piece):
        return bytes(BYTE_OF_LETTER[letter] for letter in piece)
    return piece.encode()


def _spell_byte_fallback(piece: str) -> bytes:
    number = BYTE_BY_NUMBER.fullmatch(piece)
    return bytes([int(number[1], 16)]) if number else piece.replace(SPACE_MARK, " ").encode()


class TextRuler:
    """Measures where each token begins in the text that a run of tokens writes, in characters.

    A token in the middle of a character begins where that character does.
    """

    def __init__(self, position: int = 0) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._position = position

    def place(self, written: bytes) -> int:
        """Take what the next token writes; return where it begins."""
        begin = self._position
        self._position += len(self._decoder.decode(written))
        return begin

"""Text comes out as soon as its characters are whole, and altogether equals the decoding of all tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from service.engine.detokenizer import LONGEST_WINDOW, REPLACEMENT, Detokenizer
from tests.support.tiny_model import EOS_ID, byte_tokenizer

BYTES = byte_tokenizer().backend_tokenizer
TEXT = "naïve 日本語 👩‍🚀 ok"


def decode(ids):
    return BYTES.decode(ids, skip_special_tokens=True)


def pieces_of(ids, prompt=(), decode=decode):
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


def sentencepiece_decode():
    """A decoder like Llama 2's: '▁' for a space, bytes for what has no token, and no space before the first word."""
    vocabulary = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer.decode


def test_a_character_comes_out_with_its_last_byte_and_not_before():
    """Three bytes of one character give nothing, nothing, the character."""
    assert pieces_of("日".encode()) == ["", "", "日", ""]


def test_every_piece_is_whole_and_together_they_are_the_text():
    """No piece holds half a character."""
    pieces = pieces_of(TEXT.encode())
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_the_prompt_began_is_completed():
    """A prompt that ends in the middle of a character gets that character as the first text."""
    first, *rest = "語".encode()
    assert "".join(pieces_of(rest, prompt=[*b"abc", first])) == "語"


def test_a_broken_prompt_is_not_part_of_the_completion():
    """A character the prompt left unfinished and the completion does not finish stays the prompt's."""
    assert "".join(pieces_of(b"ok", prompt=[*b"abc", "語".encode()[0]])) == "ok"


def test_special_tokens_are_not_text():
    """An end-of-sequence token in the middle adds nothing and loses nothing."""
    assert "".join(pieces_of([*b"one ", EOS_ID, *b"two"])) == "one two"


def test_an_unfinished_character_at_the_end_becomes_one_replacement_character():
    """What was never completed is shown as U+FFFD at the end."""
    assert pieces_of([*b"a", *"日".encode()[:2]]) == ["a", "", "", REPLACEMENT]


def test_broken_utf8_does_not_hold_text_for_ever():
    """A model that writes lead bytes only still gets its text out, a little later."""
    lead = "日".encode()[0]
    pieces = pieces_of([lead] * (3 * LONGEST_WINDOW))
    assert "".join(pieces) == REPLACEMENT * (3 * LONGEST_WINDOW)
    assert any(pieces[: LONGEST_WINDOW // 2])


def test_a_word_keeps_its_leading_space():
    """A decoder that drops the first space of a text must not drop it between two tokens."""
    assert "".join(pieces_of([2, 3, 1], prompt=[1], decode=sentencepiece_decode())) == " world! Hello"


def test_byte_fallback_characters_come_out_whole():
    """A decoder that writes one U+FFFD per missing byte is waited for as well."""
    ids = [4 + byte for byte in "👍日".encode()]
    pieces = pieces_of(ids, prompt=[1], decode=sentencepiece_decode())
    assert [piece for piece in pieces if piece] == ["👍", "日"]


def test_a_prompt_of_special_tokens_only_is_no_obstacle():
    """A prompt that decodes to nothing still gives a context."""
    assert "".join(pieces_of(b"hi", prompt=[EOS_ID])) == "hi"


@given(st.text(max_size=40))
def test_any_text_comes_out_as_it_went_in(text):
    """Every text survives token by token."""
    assert "".join(pieces_of(text.encode())) == text


@given(st.binary(max_size=60))
def test_any_bytes_come_out_as_their_whole_decoding(data):
    """Broken UTF-8 gives, in pieces, the same text as decoded at once."""
    assert "".join(pieces_of(data)) == decode(list(data))


@pytest.mark.parametrize("length", [1, LONGEST_WINDOW, LONGEST_WINDOW + 1])
def test_tokens_that_cut_every_character_come_out(length):
    """Tokens that each end in the middle of a character are given out up to that character."""
    halves = ["日".encode()[:2], *(["日".encode()[2:] + "日".encode()[:2]] * length), "日".encode()[2:]]

    def decode_chunks(ids):
        return b"".join(halves[token] for token in ids).decode(errors="replace")

    pieces = pieces_of(range(len(halves)), decode=decode_chunks)
    if length < LONGEST_WINDOW - 1:
        assert "".join(pieces) == "日" * (length + 1)
    assert len("".join(pieces)) >= length

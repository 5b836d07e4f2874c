"""Bytes and texts of single tokens, in the two notations of vocabularies and where only decoding tells."""

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from service.registry.vocabulary import TextRuler, Vocabulary
from tests.support.tiny_model import byte_tokenizer


def fallback_tokenizer(decoder=None):
    """A vocabulary as SentencePiece's: U+2581 for a space, single bytes by number."""
    pieces = ["<unk>", "<s>", "</s>", "<0xF0>", "<0x9F>", "<0x8E>", "<0x89>", "\u2581the", "\u2581", "é", "<tool_call>"]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    backend.decoder = decoder or decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_byte_level_pieces_are_the_bytes_themselves():
    """All 256 of them, whether printable or not; special tokens are their own text."""
    vocabulary = Vocabulary(byte_tokenizer())
    assert [vocabulary.bytes_of(token_id) for token_id in range(256)] == [bytes([byte]) for byte in range(256)]
    assert vocabulary.text_of(ord("a")) == "a"
    assert vocabulary.text_of(0xE2) == "bytes:\\xe2"
    assert (vocabulary.text_of(256), vocabulary.special_ids) == ("<|endoftext|>", {256, 257, 258})


def test_byte_fallback_pieces_are_text_or_one_byte():
    """A space has a mark of its own, and four bytes make a character."""
    vocabulary = Vocabulary(fallback_tokenizer())
    assert b"".join(map(vocabulary.bytes_of, [3, 4, 5, 6])).decode() == "🎉"
    assert [vocabulary.text_of(token_id) for token_id in (7, 8, 9)] == [" the", " ", "é"]
    assert (vocabulary.text_of(10), vocabulary.special_ids) == ("<tool_call>", {1, 2})


def test_other_tokenizers_are_asked_to_decode():
    """A decoder of an unknown kind writes what it writes."""
    vocabulary = Vocabulary(fallback_tokenizer(decoders.WordPiece(prefix="\u2581")))
    assert vocabulary.text_of(9) == "é"


def test_a_token_beyond_the_tokenizer_has_a_name():
    """A model may have more rows than its tokenizer has tokens."""
    vocabulary = Vocabulary(byte_tokenizer())
    assert (vocabulary.bytes_of(300), vocabulary.text_of(300)) == (b"", "token_id:300")


def test_places_are_characters():
    """A token inside a character begins where the character does; broken bytes are characters of their own."""
    ruler = TextRuler()
    written = [b"a", b"\xe2", b"\x82\xac", b"", b"b", b"\xff", b"c"]
    assert [ruler.place(part) for part in written] == [0, 1, 1, 2, 2, 3, 4]
    assert TextRuler(7).place(b"x") == 7

"""Grammars that a completion's text must follow, by xgrammar: https://github.com/mlc-ai/xgrammar, arXiv:2411.15100.

    check_grammar      in the server, before a request is queued: what cannot be compiled is a 400
    GrammarCompiler    in the engine, beside the loop: (kind, text) -> tables for this tokenizer's vocabulary, cached
    GrammarState       in the engine, one for each sequence: which tokens may come next, after those that came

A token may come if its bytes continue the text towards some text of the grammar; an end-of-sequence token only where
the text is one. Tokens that the detokenizer leaves out never come, because what they spell would be missing.
"""

from collections.abc import Collection, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from service.engine.json_schema import compilable_schema
from service.engine.logit_edits import WORD_BITS
from service.engine.repetition import MOST_REPETITIONS, largest_repetition
from service.engine.types import Grammar
from service.errors import BadRequest

if TYPE_CHECKING:
    import xgrammar  # a third of a second to import, so only where a grammar comes

CACHE_BYTES = 256 << 20  # of compiled grammars; the least recently used goes first
LONGEST_TEXT = 64 << 10  # bytes of a schema, an expression or a grammar
MOST_WHITESPACE = 8  # characters in a row between the parts of a JSON text; a model could write blanks for ever
END_BYTE = 256  # the end-of-sequence token of a vocabulary of bytes
SECOND_BYTES = {  # of UTF-8, where they are fewer than 80 to BF: Unicode 16, table 3-7
    b"\xe0": (0xA0, 0xBF),
    b"\xed": (0x80, 0x9F),
    b"\xf0": (0x90, 0xBF),
    b"\xf4": (0x80, 0x8F),
}
ANY_OBJECT = """{"type": "object", "additionalProperties": {"$ref": "#/$defs/any"}, "$defs": {"any": {"anyOf": [
    {"type": ["string", "number", "boolean", "null"]},
    {"type": "array", "items": {"$ref": "#/$defs/any"}},
    {"type": "object", "additionalProperties": {"$ref": "#/$defs/any"}}
]}}}"""  # with every blank counted, unlike the compiler's own for an object of anything
PARAMS = {"json_schema": "response_format", "json_object": "response_format", "regex": "regex", "ebnf": "grammar"}


def check_grammar(grammar: Grammar) -> None:
    """Refuse a grammar that cannot be compiled, or that promises more than can be kept.

    Raises:
        BadRequest: with what is wrong, and where.
    """
    if grammar.kind not in PARAMS:
        raise BadRequest(f"a grammar's kind is one of {', '.join(PARAMS)}, not {grammar.kind!r}")
    param = PARAMS[grammar.kind]
    if not grammar.text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in grammar.text):
        raise BadRequest(f"the {grammar.kind} holds half a character (a surrogate); write it whole", param=param)
    if len(grammar.text.encode()) > LONGEST_TEXT:
        raise BadRequest(f"the {grammar.kind} is longer than {LONGEST_TEXT} bytes; shorten it", param=param)
    if grammar.kind in ("regex", "ebnf") and largest_repetition(grammar.text) > MOST_REPETITIONS:
        raise BadRequest(
            f"the {grammar.kind} repeats something more than {MOST_REPETITIONS} times; use * or lower bounds",
            param=param,
        )
    try:
        compiler, vocabulary = _byte_tables()
        state = GrammarState(compiler.compile_grammar(_parse(grammar)), vocabulary)
    except (RuntimeError, ValueError) as error:  # the latter where the compiler cuts a character in its complaint
        raise BadRequest(f"the {grammar.kind} cannot be used: {_in_words(error)}", param=param) from None
    if not state.allowed_bits().any():
        raise BadRequest(f"no text follows this {grammar.kind}, for it never ends", param=param)


class GrammarState:
    """Where one sequence's text stands in its grammar."""

    def __init__(self, compiled: "xgrammar.CompiledGrammar", vocabulary: "Vocabulary") -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._vocabulary = vocabulary
        self._sayable_W = vocabulary.sayable_W
        self._bits_1W = torch.empty(1, len(self._sayable_W), dtype=torch.int32)

    def allowed_bits(self) -> Tensor:
        """Return which tokens may come next: int32 words [W], bit i of word w for token 32 * w + i."""
        self._matcher.fill_next_token_bitmask(self._bits_1W)
        return self._bits_1W[0] & self._sayable_W

    def take(self, token_id: int) -> None:
        """Move on by a token.

        Raises:
            RuntimeError: it was not allowed.
        """
        if not self._matcher.accept_token(token_id):
            raise RuntimeError(f"the grammar does not allow token {token_id} here")
        self._sayable_W = self._vocabulary.after.get(token_id, self._vocabulary.sayable_W)


class Vocabulary:
    """What xgrammar does not know of a vocabulary: tokens that must not come, and what may follow half a character.

    The compiler lets bytes make characters that UTF-8 does not have: surrogates, overlong ones, and past the last one.

    Attributes:
        sayable_W: bits of the tokens that may come at all.
        after: for tokens that end in such a first byte: bits of those that may come then.
    """

    def __init__(self, tokens: Sequence[bytes], *, without: Collection[int] = ()) -> None:
        self.sayable_W = _words(len(tokens), without=without)
        self.after: dict[int, Tensor] = {}
        for first, (least, most) in SECOND_BYTES.items():
            enders = [token_id for token_id, token in enumerate(tokens) if token[-1:] == first]
            wrong = [
                token_id
                for token_id, token in enumerate(tokens)
                if token and 0x80 <= token[0] <= 0xBF and not least <= token[0] <= most
            ]
            after_W = _words(len(tokens), without={*without, *wrong})
            self.after |= dict.fromkeys(enders, after_W)


class GrammarCompiler:
    """Compiles grammars for one vocabulary; may be used from one thread while states are used in another.

    Args:
        tokenizer: of the model.
        vocab_size: of the model's logits; tokens past the tokenizer's are never allowed.
        end_token_ids: allowed where the text is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(end_token_ids)

    def compile(self, grammar: Grammar) -> GrammarState:
        """Return a new sequence's state; the tables are compiled when they are not in the cache.

        Raises:
            RuntimeError: the grammar cannot be compiled; `check_grammar` would have said so.
        """
        compiler, vocabulary = self._tables
        return GrammarState(compiler.compile_grammar(_parse(grammar)), vocabulary)

    @cached_property
    def _tables(self) -> "tuple[xgrammar.GrammarCompiler, Vocabulary]":
        """Made for the first grammar, because every token of the vocabulary is looked at."""
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(
            self._tokenizer, vocab_size=self._vocab_size, stop_token_ids=self._ends
        )
        added = self._tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in added.items() if token.special}
        special |= set(self._tokenizer.all_special_ids)
        vocabulary = Vocabulary(info.decoded_vocab, without=special - set(self._ends))
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES), vocabulary


@cache
def _byte_tables() -> "tuple[xgrammar.GrammarCompiler, Vocabulary]":
    """Return the tables of a vocabulary of all bytes, with which a grammar can be tried out quickly."""
    import xgrammar

    tokens = [bytes([byte]) for byte in range(END_BYTE)] + [b""]
    info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, stop_token_ids=[END_BYTE])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False), Vocabulary(tokens)


def _parse(grammar: Grammar) -> "xgrammar.Grammar":
    """Parse a grammar's text; raises RuntimeError, or BadRequest for a schema that cannot be kept."""
    import xgrammar

    match grammar.kind:
        case "regex":
            return xgrammar.Grammar.from_regex(grammar.text)
        case "ebnf":
            return xgrammar.Grammar.from_ebnf(grammar.text)
        case _:
            schema = grammar.text if grammar.kind == "json_schema" else ANY_OBJECT
            return xgrammar.Grammar.from_json_schema(compilable_schema(schema), max_whitespace_cnt=MOST_WHITESPACE)


def _words(vocab_size: int, *, without: Collection[int]) -> Tensor:
    """Return bits for all tokens of the vocabulary but some."""
    bits = torch.zeros(-(-vocab_size // WORD_BITS) * WORD_BITS, dtype=torch.int64)
    bits[:vocab_size] = 1
    bits[[token_id for token_id in without if token_id < vocab_size]] = 0
    words_W: Tensor = (bits.unflatten(0, (-1, WORD_BITS)) << torch.arange(WORD_BITS)).sum(dim=-1)
    return words_W.int()  # the highest bit becomes the sign


def _in_words(error: Exception) -> str:
    """Return what the compiler complains about, without where in its own source."""
    if isinstance(error, UnicodeError):
        return "it has a character where none of its kind may stand"
    *_, sentence = str(error).strip().splitlines()[0].partition(" ")
    return sentence.partition(": ")[2] if sentence.startswith("/") else str(error).strip()

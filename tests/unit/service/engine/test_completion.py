"""A drawn token becomes text and, at the right moment, a finish reason."""

import pytest

from service.engine.completion import Completion
from service.engine.sequence import Sequence
from service.engine.types import FinishReason, GenerationRequest, SamplingParams
from tests.support.tiny_model import EOS_ID, byte_tokenizer

BYTES = byte_tokenizer().backend_tokenizer


def complete(text, *, max_model_len=100, ends_with=(), **sampling):
    """Feed the bytes of `text`, then `ends_with`, until the completion ends; return text, reason and tokens."""
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(b"prompt"),
        sampling=SamplingParams(**{"max_tokens": 50, **sampling}),
    )
    sequence = Sequence(request=request, seed=0, tokens=list(request.prompt_token_ids))
    completion = Completion(
        sequence, decode=BYTES.decode, eos_token_ids=frozenset({EOS_ID}), max_model_len=max_model_len
    )
    shown = ""
    for token in [*text.encode(), *ends_with]:
        advance = completion.advance(token)
        shown += advance.text
        if advance.finish_reason is not None:
            return shown, advance.finish_reason, sequence.num_generated_tokens
    return shown, None, sequence.num_generated_tokens


def test_an_end_token_stops_and_is_counted_but_not_shown():
    """The text is what came before; the token belongs to the completion's count."""
    assert complete("ok", ends_with=[EOS_ID]) == ("ok", FinishReason.STOP, 3)


def test_ignore_eos_goes_on():
    """With ignore_eos the end token is only a token without text."""
    assert complete("ok", ends_with=[EOS_ID, *b"!"], ignore_eos=True) == ("ok!", None, 4)


def test_max_tokens_and_context_end_with_length():
    """Whichever comes first; the prompt has six tokens."""
    assert complete("abcdef", max_tokens=4) == ("abcd", FinishReason.LENGTH, 4)
    assert complete("abcdef", max_model_len=9) == ("abc", FinishReason.LENGTH, 3)


@pytest.mark.parametrize(("stop", "shown"), [(("de",), "abc"), (("f", "cd"), "ab")])
def test_a_stop_string_ends_before_itself(stop, shown):
    """Of several the first complete one counts, and none of it is shown."""
    text, reason, _ = complete("abcdef", stop=stop)
    assert (text, reason) == (shown, FinishReason.STOP)


def test_a_stop_string_that_never_comes_changes_nothing():
    """The text goes on to its ordinary end."""
    assert complete("abcdef", stop=("zz",), max_tokens=6) == ("abcdef", FinishReason.LENGTH, 6)


def test_what_was_held_is_shown_at_the_end():
    """The beginning of a stop string, or of a character, is given out when nothing can follow."""
    assert complete("ab<", stop=("</s>",), max_tokens=3) == ("ab<", FinishReason.LENGTH, 3)
    assert complete("a日", max_tokens=3) == ("a\ufffd", FinishReason.LENGTH, 3)


def test_a_stop_string_in_the_last_token_is_a_stop():
    """Reaching a stop string and max_tokens together is STOP."""
    assert complete("abcd", stop=("cd",), max_tokens=4) == ("ab", FinishReason.STOP, 4)


def test_a_stop_token_stops_without_its_text():
    """Whether or not end-of-sequence tokens are ignored; the token is counted."""
    stops = {"stop_token_ids": (ord("c"), 7)}
    assert complete("abcd", **stops) == ("ab", FinishReason.STOP, 3)
    assert complete("ab", ends_with=[EOS_ID, *b"cd"], ignore_eos=True, **stops) == ("ab", FinishReason.STOP, 4)


def test_the_stop_text_is_returned_if_asked_for():
    """Up to its end, and nothing after it."""
    assert complete("abcdef", stop=("cd", "zz"), include_stop=True) == ("abcd", FinishReason.STOP, 4)
    assert complete("abcd", stop=("bcd",), include_stop=True, max_tokens=4) == ("abcd", FinishReason.STOP, 4)


def test_no_stop_text_ends_before_min_tokens():
    """The first that is complete afterwards does, even if it began before; what came before is text like any other."""
    assert complete("ababab", stop=("ab",), min_tokens=3) == ("ab", FinishReason.STOP, 4)
    assert complete("aaaa", stop=("aa",), min_tokens=3) == ("a", FinishReason.STOP, 3)
    assert complete("abcd", stop=("ab",), min_tokens=4) == ("abcd", None, 4)
    assert complete("abab", stop=("ab",), min_tokens=2) == ("", FinishReason.STOP, 2)

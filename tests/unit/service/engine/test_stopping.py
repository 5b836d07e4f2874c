"""Stop strings end the text where they are complete, however the text is cut into pieces."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from service.engine.stopping import StopStrings


def shown(stop, pieces):
    """Return the text that is shown, and whether a stop string ended it."""
    watch = StopStrings(stop)
    text = ""
    for piece in pieces:
        result = watch.push(piece)
        text += result.text
        if result.stopped:
            return text, True
    return text + watch.flush(), False


def test_without_stop_strings_text_passes_at_once():
    """Nothing is held when there is nothing to wait for."""
    piece = StopStrings(()).push("any text")
    assert (piece.text, piece.stopped) == ("any text", False)


def test_a_stop_string_across_three_pieces_is_not_shown():
    """Its beginning is held back until it is decided."""
    watch = StopStrings(("</end>",))
    assert watch.push("hello <").text == "hello "
    assert watch.push("/en").text == ""
    last = watch.push("d> more")
    assert (last.text, last.stopped) == ("", True)


def test_what_only_looked_like_a_stop_string_is_shown_later():
    """Held text is given out as soon as it cannot be a stop string any more."""
    watch = StopStrings(("\n\n",))
    assert watch.push("line\n").text == "line"
    assert watch.push("next").text == "\nnext"


def test_held_text_is_given_out_at_the_end():
    """A beginning of a stop string at the very end belongs to the text."""
    assert shown(("STOP",), ["we ST"]) == ("we ST", False)


def test_of_several_the_one_complete_first_wins():
    """'bc' is complete before 'abcd', though that begins earlier; of those complete together the longer wins."""
    assert shown(("abcd", "bc"), ["xabcd"]) == ("xa", True)
    assert shown(("c", "abc"), ["xabc"]) == ("x", True)


def test_a_repeating_stop_string_overlapping_itself_is_found():
    """'aab' in 'aaab' needs the held text to fall back by one, not to start over."""
    assert shown(("aab",), ["a", "a", "a", "b", "c"]) == ("a", True)


def test_the_stop_string_is_shown_if_it_is_included():
    """Up to its end, across pieces too."""
    watch = StopStrings(("</end>",), included=True)
    assert watch.push("hello <").text == "hello "
    last = watch.push("/end> more")
    assert (last.text, last.stopped) == ("</end>", True)


def test_a_stop_string_that_may_not_end_passes():
    """Its last characters may begin another, and are held like any others."""
    watch = StopStrings(("aa",))
    piece = watch.push("xaa", may_end=False)
    assert (piece.text, piece.stopped) == ("xa", False)
    last = watch.push("a")
    assert (last.text, last.stopped) == ("", True)


@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_the_result_does_not_depend_on_the_pieces(text, stop, cuts):
    """Any cutting shows the same as one character at a time, and never a stop string."""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    result, stopped = shown(stop, pieces)
    ends = [text.find(one) + len(one) for one in stop if one in text]
    assert stopped == bool(ends)
    assert (result, stopped) == shown(stop, list(text))
    assert not any(one in result for one in stop)
    assert text.startswith(result)
    if not stopped:
        assert result == text

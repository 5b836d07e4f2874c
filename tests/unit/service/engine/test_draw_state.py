"""What a sequence keeps between its draws becomes the edits of its next one."""

from service.engine.draw_state import DrawState
from service.engine.sampling import uniform_number
from service.engine.sequence import Sequence
from service.engine.types import GenerationRequest, SamplingParams

EOS = 256


def started(prompt=(1, 2, 2), seed=5, **sampling):
    request = GenerationRequest(
        request_id="r", prompt_token_ids=tuple(prompt), sampling=SamplingParams(**{"max_tokens": 9, **sampling})
    )
    sequence = Sequence(request=request, seed=seed, tokens=list(prompt))
    return sequence, DrawState(sequence, end_token_ids=(EOS,))


def draw_tokens(sequence, state, *tokens):
    for token in tokens:
        state.take(token)
        sequence.tokens.append(token)
    return state.next_draw()


def test_a_plain_request_has_no_edits():
    """So that nobody pays for what was not asked for; the number is that of the seed and the count of draws."""
    draw = draw_tokens(*started(temperature=0.5, top_p=0.9, top_k=4, min_p=0.1), 7, 8)
    assert draw.edits is None
    assert (draw.temperature, draw.top_p, draw.top_k, draw.min_p) == (0.5, 0.9, 4, 0.1)
    assert draw.uniform == uniform_number(5, 2)


def test_ends_are_forbidden_until_min_tokens_are_drawn():
    """The end-of-sequence token and stop_token_ids, with ignore_eos too; afterwards nothing is."""
    sequence, state = started(min_tokens=2, stop_token_ids=(9, 4), ignore_eos=True)
    assert state.next_draw().edits.forbidden == (4, 9, EOS)
    assert draw_tokens(sequence, state, 7).edits.forbidden == (4, 9, EOS)
    assert draw_tokens(sequence, state, 7).edits is None


def test_repetition_counts_the_prompt_and_the_others_do_not():
    """The prompt's tokens are in the list for repetition_penalty alone."""
    both = draw_tokens(*started(repetition_penalty=1.3, presence_penalty=1.0), 2, 7, 7).edits
    assert dict(zip(both.counts.ids, both.counts.times, strict=True)) == {1: 0, 2: 1, 7: 2}
    presence = draw_tokens(*started(presence_penalty=1.0, frequency_penalty=-0.5), 2, 7, 7).edits
    assert dict(zip(presence.counts.ids, presence.counts.times, strict=True)) == {2: 1, 7: 2}
    assert (presence.repetition, presence.frequency, presence.presence) == (1.0, -0.5, 1.0)


def test_bias_is_handed_on():
    """It is the same in every draw."""
    sequence, state = started(logit_bias=((3, 1.5), (4, -100.0)))
    assert state.next_draw().edits.bias == draw_tokens(sequence, state, 3).edits.bias == ((3, 1.5), (4, -100.0))

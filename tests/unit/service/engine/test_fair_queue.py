"""Turns between callers: nobody waits for another's queue, and one alone keeps its order."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from service.engine.fair_queue import FairQueue
from service.engine.sequence import Sequence
from service.engine.types import GenerationRequest, SamplingParams
from tests.unit.service.engine.test_scheduler import make_pool


def make_sequence(name, caller, *, num_tokens=4, priority=0):
    request = GenerationRequest(
        request_id=name,
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=SamplingParams(max_tokens=1),
        priority=priority,
        caller=caller,
    )
    return Sequence(request=request, seed=0, tokens=list(range(num_tokens)))


def order_of_ends(pool, sequences):
    """Run until all have drawn one token; returns their ids in the order in which they did."""
    for sequence in sequences:
        pool.scheduler.add(sequence)
    ends = []
    while pool.scheduler.has_work:
        for sequence in pool.step():
            ends.append(sequence.request_id)
            pool.scheduler.finish(sequence)
    return ends


def test_a_newcomer_does_not_wait_for_anothers_queue():
    """Of two hundred waiting ones of one caller only those that run already come before another's first."""
    pool = make_pool(64, max_num_sequences=1)
    greedy = [make_sequence(f"a{number}", "a") for number in range(200)]
    for sequence in greedy:
        pool.scheduler.add(sequence)
    ends = []
    for _ in range(20):
        ends += [sequence.request_id for sequence in pool.step()]
        pool.scheduler.finish(greedy[len(ends) - 1])
    rest = order_of_ends(pool, [make_sequence("b0", "b")])
    assert rest.index("b0") <= 1


def test_one_caller_keeps_its_order():
    """First come, first served, as if there were no turns."""
    pool = make_pool(64, max_num_sequences=1)
    sequences = [make_sequence(f"a{number}", "a", num_tokens=1 + number % 5) for number in range(30)]
    assert order_of_ends(pool, sequences) == [f"a{number}" for number in range(30)]


def test_busy_callers_get_equal_shares_of_tokens():
    """Whoever asks for longer texts gets fewer of them."""
    pool = make_pool(64, max_num_sequences=1)
    long = [make_sequence(f"a{number}", "a", num_tokens=11) for number in range(60)]
    short = [make_sequence(f"b{number}", "b", num_tokens=2) for number in range(60)]
    first = order_of_ends(pool, long + short)[:40]
    counts = Counter(name[0] for name in first)
    assert 3 <= counts["b"] / counts["a"] <= 5  # 12 tokens to 3


def test_priorities_come_before_turns():
    """They say what they say."""
    pool = make_pool(64, max_num_sequences=1)
    later = [make_sequence(f"b{number}", "b", priority=1) for number in range(3)]
    first = [make_sequence(f"a{number}", "a") for number in range(3)]
    assert order_of_ends(pool, later + first) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_caller_whose_requests_are_gone_owes_nothing():
    """Requests that were aborted are not held against it."""
    queue = FairQueue()
    for _ in range(100):
        queue.enter("a", 1000)
    for _ in range(100):
        queue.leave("a")
    assert queue.enter("a", 1) == queue.enter("b", 1) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=60), st.integers(1, 4))
def test_whoever_waits_is_served_in_the_end(arrivals, at_once):
    """Any mixture of callers and lengths ends, each sequence once."""
    pool = make_pool(32, max_num_sequences=at_once)
    sequences = [make_sequence(f"{caller}{index}", caller, num_tokens=n) for index, (caller, n) in enumerate(arrivals)]
    ends = order_of_ends(pool, sequences)
    assert sorted(ends) == sorted(sequence.request_id for sequence in sequences)

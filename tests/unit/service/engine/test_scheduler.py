"""The scheduler gives every sequence exactly its tokens, whatever comes and goes, and returns every page."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.page_allocator import PageAllocator
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.types import GenerationRequest, SamplingParams

PAGE_SIZE = 4


@dataclass
class Pool:
    """A scheduler with its allocator, and a model that draws the position of the next token as that token."""

    allocator: PageAllocator
    scheduler: Scheduler
    budget: int

    def step(self):
        """Run one step, checking what every step must keep; returns the sequences that drew."""
        chunks = self.scheduler.schedule()
        assert sum(chunk.length for chunk in chunks) <= self.budget
        for chunk in chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.num_computed
            assert 1 <= chunk.length <= len(sequence.tokens) - chunk.start
            assert len(sequence.page_table) * PAGE_SIZE >= chunk.start + chunk.length
        owned = [page for chunk in chunks for page in chunk.sequence.page_table]
        assert len(owned) == len(set(owned)), "two sequences share a page"
        for chunk in chunks:
            self.scheduler.computed(chunk)
            if chunk.draws:
                chunk.sequence.tokens.append(len(chunk.sequence.tokens))
        self.allocator.check_integrity()
        return [chunk.sequence for chunk in chunks if chunk.draws]


def make_pool(num_pages, *, max_num_sequences=8, max_batched_tokens=16):
    allocator = PageAllocator(num_pages)
    scheduler = Scheduler(
        allocator=allocator,
        page_size=PAGE_SIZE,
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_batched_tokens,
    )
    return Pool(allocator=allocator, scheduler=scheduler, budget=max_batched_tokens)


def make_sequence(name, num_prompt_tokens):
    prompt = tuple(range(num_prompt_tokens))
    request = GenerationRequest(request_id=name, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=1))
    return Sequence(request=request, seed=0, tokens=list(prompt))


def test_a_long_prompt_is_computed_in_chunks_and_draws_at_its_end():
    """A prompt over the budget takes several steps, and only the last gives a token."""
    pool = make_pool(20, max_batched_tokens=8)
    sequence = make_sequence("long", 20)
    pool.scheduler.add(sequence)
    assert [pool.step() for _ in range(3)] == [[], [], [sequence]]


def test_running_sequences_go_before_a_new_prompt():
    """While a long prompt is computed, a running sequence gets its token in every step."""
    pool = make_pool(20, max_batched_tokens=8)
    short, long = make_sequence("short", 3), make_sequence("long", 30)
    pool.scheduler.add(short)
    pool.step()
    pool.scheduler.add(long)
    assert [pool.step() for _ in range(3)] == [[short], [short], [short]]
    assert long.num_computed == 3 * 7


def test_no_more_sequences_run_than_a_step_can_give_a_token():
    """A budget below max_num_sequences limits how many run, so that none starves."""
    pool = make_pool(20, max_num_sequences=8, max_batched_tokens=2)
    for index in range(4):
        pool.scheduler.add(make_sequence(str(index), 1))
    pool.step()
    assert (pool.scheduler.num_running, pool.scheduler.num_waiting) == (2, 2)


def test_the_sequence_admitted_last_gives_its_pages_to_an_older_one():
    """When pages run out the youngest is preempted, keeps its tokens, and waits at the front."""
    pool = make_pool(4, max_batched_tokens=16)
    old, young, newcomer = make_sequence("old", 8), make_sequence("young", 8), make_sequence("new", 1)
    pool.scheduler.add(old)
    pool.scheduler.add(young)
    assert pool.step() == [old, young]
    pool.scheduler.add(newcomer)
    assert pool.step() == [old]
    assert pool.scheduler.num_preemptions == 1
    assert (young.num_computed, len(young.tokens), len(young.page_table)) == (0, 9, 0)
    pool.scheduler.finish(old)
    assert pool.step() == [young, newcomer]
    assert young.tokens == list(range(10))


def test_a_finished_sequence_leaves_nothing_behind():
    """Finishing frees all pages, from running as from waiting."""
    pool = make_pool(4, max_num_sequences=1)
    running, waiting = make_sequence("running", 5), make_sequence("waiting", 5)
    pool.scheduler.add(running)
    pool.scheduler.add(waiting)
    pool.step()
    pool.scheduler.finish(running)
    pool.scheduler.finish(waiting)
    assert pool.allocator.num_free == 4
    assert not pool.scheduler.has_work


def test_finishing_an_unknown_sequence_is_refused():
    """A sequence the scheduler does not hold cannot be finished."""
    pool = make_pool(4)
    with pytest.raises(ValueError, match="not in"):
        pool.scheduler.finish(make_sequence("stranger", 2))


LONGEST = 24
arrivals = st.lists(
    st.tuples(st.integers(1, LONGEST - 1), st.integers(1, LONGEST), st.integers(0, 12), st.integers(0, 40)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    arrivals=arrivals,
    extra_pages=st.integers(0, 10),
    max_num_sequences=st.integers(1, 6),
    max_batched_tokens=st.integers(1, 20),
)
def test_any_mix_ends_with_every_token_drawn_once_and_the_pool_full(
    arrivals, extra_pages, max_num_sequences, max_batched_tokens
):
    """Whatever arrives, leaves or is preempted: each sequence gets exactly its tokens, in order, and all pages return.

    An arrival is (prompt tokens, tokens to generate, step of arrival, step at which it is aborted if still there).
    """
    pool = make_pool(
        -(-LONGEST // PAGE_SIZE) + extra_pages,
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_batched_tokens,
    )
    goals, alive, done = {}, {}, []
    for step in range(5_000):
        for index, (num_prompt, num_new, arrives, aborts) in enumerate(arrivals):
            if arrives == step:
                sequence = alive[index] = make_sequence(str(index), num_prompt)
                goals[index] = min(num_prompt + num_new, LONGEST)
                pool.scheduler.add(sequence)
            elif aborts == step and index in alive:
                pool.scheduler.finish(alive.pop(index))
        pool.step()
        for index, sequence in list(alive.items()):
            if len(sequence.tokens) == goals[index]:
                pool.scheduler.finish(alive.pop(index))
                done.append(sequence)
        if not alive and step > 12:
            break
    assert not alive, "a sequence never ended"
    for sequence in done:
        assert sequence.tokens == list(range(len(sequence.tokens)))
    assert pool.allocator.num_free == pool.allocator.num_pages
    assert not pool.scheduler.has_work

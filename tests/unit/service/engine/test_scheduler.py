"""The scheduler gives every sequence exactly its tokens, whatever comes and goes, and returns every page."""

from dataclasses import dataclass, field

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
    """A scheduler with its allocator, a memory, and a model that draws the position of the next token as that token.

    The memory notes for every slot all tokens up to the one whose keys it holds: what keys depend on.
    """

    allocator: PageAllocator
    scheduler: Scheduler
    budget: int
    memory: dict[int, tuple[int, ...]] = field(default_factory=dict)
    computed_tokens: int = 0

    def step(self):
        """Run one step, checking what every step must keep; returns the sequences that drew."""
        chunks = self.scheduler.schedule()
        assert sum(chunk.length for chunk in chunks) <= self.budget
        assert len(chunks) == self.scheduler.num_running, "a running sequence got no token"
        self.scheduler.check_integrity()
        written = [page for chunk in chunks for page in self.compute(chunk)]
        assert len(written) == len(set(written)), "a page has two writers"
        for chunk in chunks:
            self.scheduler.computed(chunk)
            if chunk.draws:
                chunk.sequence.tokens.append(chunk.sequence.tokens[0] + len(chunk.sequence.tokens))
        self.scheduler.check_integrity()
        return [chunk.sequence for chunk in chunks if chunk.draws]

    def compute(self, chunk):
        """Write a chunk's keys, after checking that those before it are the sequence's own; returns its pages."""
        sequence, end = chunk.sequence, chunk.start + chunk.length
        assert chunk.start == sequence.num_computed
        assert 1 <= chunk.length <= len(sequence.tokens) - chunk.start
        slots = [page * PAGE_SIZE + offset for page in sequence.page_table for offset in range(PAGE_SIZE)]
        for position in range(chunk.start):
            assert self.memory[slots[position]] == (sequence.request.cache_salt, *sequence.tokens[: position + 1])
        for position in range(chunk.start, end):
            self.memory[slots[position]] = (sequence.request.cache_salt, *sequence.tokens[: position + 1])
        self.computed_tokens += chunk.length
        pages = sequence.page_table[chunk.start // PAGE_SIZE : -(-end // PAGE_SIZE)]
        assert not any(page in self.allocator.prefix_cache for page in pages), "a known page was written"
        return pages


def make_pool(num_pages, *, max_num_sequences=8, max_batched_tokens=16, prefix_caching=True):
    allocator = PageAllocator(num_pages)
    scheduler = Scheduler(
        allocator=allocator,
        page_size=PAGE_SIZE,
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_batched_tokens,
        prefix_caching=prefix_caching,
    )
    return Pool(allocator=allocator, scheduler=scheduler, budget=max_batched_tokens)


def make_sequence(name, num_prompt_tokens, *, first=0, priority=0, salt="", prompt_logprobs=None):
    """Return a sequence whose prompt counts up from `first`; equal firsts are equal beginnings."""
    prompt = tuple(range(first, first + num_prompt_tokens))
    request = GenerationRequest(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=1, prompt_logprobs=prompt_logprobs),
        priority=priority,
        cache_salt=salt,
    )
    return Sequence(request=request, seed=0, tokens=list(prompt))


def draw(pool, sequence, num_tokens):
    """Run a sequence by itself until it has drawn so many tokens, and finish it; returns how many were computed."""
    before = pool.computed_tokens
    pool.scheduler.add(sequence)
    while sequence.num_generated_tokens < num_tokens:
        pool.step()
    pool.scheduler.finish(sequence)
    return pool.computed_tokens - before


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
    old, young, newcomer = make_sequence("old", 8), make_sequence("young", 8, first=50), make_sequence("new", 1)
    pool.scheduler.add(old)
    pool.scheduler.add(young)
    assert pool.step() == [old, young]
    pool.scheduler.add(newcomer)
    assert pool.step() == [old]
    assert (pool.scheduler.num_preemptions, young.num_preemptions, old.num_preemptions) == (1, 1, 0)
    assert (young.num_computed, len(young.tokens), len(young.page_table)) == (0, 9, 0)
    pool.scheduler.finish(old)
    assert pool.step() == [young, newcomer]
    assert young.tokens == list(range(50, 60))


def test_of_unequal_priorities_the_last_is_preempted_though_it_came_first():
    """Pages are taken from the priority that matters least, not from the latest arrival."""
    pool = make_pool(4, max_batched_tokens=16)
    unimportant, important = make_sequence("later", 8, priority=1), make_sequence("sooner", 8, first=50, priority=-1)
    pool.scheduler.add(unimportant)
    pool.step()
    pool.scheduler.add(important)
    assert pool.step() == [important]
    assert (unimportant.num_preemptions, important.num_preemptions) == (1, 0)


def test_the_queue_is_ordered_by_priority_then_arrival():
    """With one place, everybody gets it in order of rank."""
    pool = make_pool(8, max_num_sequences=1)
    running = make_sequence("first come", 2, priority=5)
    pool.scheduler.add(running)
    pool.step()
    for name, priority in [("d", 7), ("b", 0), ("c", 0), ("a", -3)]:
        pool.scheduler.add(make_sequence(name, 2, priority=priority))
    order = []
    while pool.scheduler.has_work:
        [sequence] = pool.step()
        order.append(sequence.request_id)
        pool.scheduler.finish(sequence)
    assert order == ["first come", "a", "b", "c", "d"]


def test_an_important_prompt_goes_before_the_rest_of_an_unimportant_one():
    """A long prompt that is half read gives way, but goes on with what the budget has left, a token at least."""
    pool = make_pool(40, max_batched_tokens=8)
    long, urgent = make_sequence("long", 60, priority=1), make_sequence("urgent", 14, first=100)
    pool.scheduler.add(long)
    pool.step()
    pool.scheduler.add(urgent)
    assert [pool.step(), long.num_computed] == [[], 8 + 1]
    assert [pool.step(), long.num_computed] == [[urgent], 9 + 1]
    assert [pool.step(), long.num_computed] == [[urgent], 10 + 7]


def test_a_long_prompt_costs_the_others_no_step():
    """While three long prompts are read, each running sequence draws in every step, and no step exceeds the budget."""
    pool = make_pool(200, max_batched_tokens=12)
    short = [make_sequence(str(index), 2, first=1000 * index) for index in range(4)]
    for sequence in short:
        pool.scheduler.add(sequence)
    pool.step()
    for index in range(3):
        pool.scheduler.add(make_sequence(f"long {index}", 40, first=10_000 * (index + 1)))
    for _ in range(12):
        assert set(short) <= set(pool.step())


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
    pool.scheduler.add(make_sequence("known", 2))
    with pytest.raises(ValueError, match="'stranger' is not in"):
        pool.scheduler.finish(make_sequence("stranger", 2))


def test_a_known_prefix_is_not_computed_again():
    """Of a prompt of 14 tokens that was computed before, three pages are found and two tokens are computed."""
    pool = make_pool(20)
    assert draw(pool, make_sequence("miss", 14), 1) == 14
    hit = make_sequence("hit", 14)
    assert draw(pool, hit, 1) == 2
    assert hit.num_cached_tokens == 12
    assert (pool.scheduler.prefix_cache_queries, pool.scheduler.prefix_cache_hits) == (28, 12)
    assert pool.allocator.num_free == 20


def test_a_prompt_that_is_known_whole_still_computes_its_last_page():
    """Somebody has to give the logits of the last token, and the page it lies in is not the cache's to write."""
    pool = make_pool(20)
    draw(pool, make_sequence("miss", 12), 1)
    hit = make_sequence("hit", 12)
    assert draw(pool, hit, 1) == 4
    assert hit.num_cached_tokens == 8


def test_the_next_turn_of_a_chat_finds_the_last_answer():
    """Pages of drawn tokens are known as those of prompts are."""
    pool = make_pool(20)
    draw(pool, make_sequence("question", 5), 12)  # 16 of its 17 tokens were computed
    turn = make_sequence("question, answer, question", 25)
    assert draw(pool, turn, 1) == 25 - 16
    assert turn.num_cached_tokens == 16


def test_a_preempted_sequence_finds_its_own_pages_again():
    """What nobody else took in the meantime is not computed twice, and does not count as a hit of its prompt."""
    pool = make_pool(6, max_batched_tokens=16)
    old, young = make_sequence("old", 8), make_sequence("young", 12, first=50)
    pool.scheduler.add(old)
    pool.scheduler.add(young)
    while not young.num_preemptions:
        pool.step()
    pool.scheduler.finish(old)
    before = pool.computed_tokens
    assert pool.step() == [young]
    assert pool.computed_tokens - before < 12
    assert (young.num_cached_tokens, pool.scheduler.prefix_cache_queries) == (0, 20)


def test_a_running_sequence_shares_its_pages():
    """A prompt that begins like one that still runs takes no pages for the beginning."""
    pool = make_pool(20)
    first, second = make_sequence("first", 16), make_sequence("second", 18)
    pool.scheduler.add(first)
    pool.step()
    pool.scheduler.add(second)
    pool.step()
    assert second.page_table[:4] == first.page_table[:4]
    assert second.page_table[4] != first.page_table[4]
    assert pool.allocator.num_free == 20 - 6
    pool.scheduler.finish(first)
    pool.step()
    pool.scheduler.finish(second)
    assert pool.allocator.num_free == 20


def test_known_pages_that_are_free_count_among_those_an_admission_takes():
    """A hit whose pages lie in the free ones waits for room, and is not admitted to be thrown out at once."""
    pool = make_pool(6, max_batched_tokens=20)
    draw(pool, make_sequence("miss", 17), 1)
    other, hit = make_sequence("other", 8, first=50), make_sequence("hit", 20)
    pool.scheduler.add(other)
    pool.step()
    pool.scheduler.add(hit)
    assert pool.step() == [other]
    assert (pool.scheduler.num_waiting, pool.scheduler.num_preemptions) == (1, 0)
    pool.scheduler.finish(other)
    assert pool.step() == [hit]
    assert hit.num_cached_tokens == 12


@pytest.mark.parametrize(
    "options", [{"salt": "other"}, {"first": 1}, {"prompt_logprobs": 0}], ids=["salt", "tokens", "prompt logprobs"]
)
def test_who_may_not_share_computes_everything(options):
    """Another salt, another beginning, or a wish for every prompt token's logits: nothing is taken from the cache."""
    pool = make_pool(20)
    draw(pool, make_sequence("miss", 14), 1)
    other = make_sequence("other", 14, **options)
    assert draw(pool, other, 1) == 14
    assert other.num_cached_tokens == 0


def test_without_prefix_caching_everything_is_computed():
    """The setting turns it off."""
    pool = make_pool(20, prefix_caching=False)
    draw(pool, make_sequence("one", 14), 1)
    assert draw(pool, make_sequence("two", 14), 1) == 14
    assert pool.scheduler.prefix_cache_hits == 0


def test_distrusted_pages_are_not_found():
    """What a failed sequence has computed serves nobody, not even those that share its pages now."""
    pool = make_pool(20)
    failed = make_sequence("failed", 14)
    pool.scheduler.add(failed)
    pool.step()
    pool.scheduler.distrust(failed)
    pool.scheduler.finish(failed)
    assert draw(pool, make_sequence("next", 14), 1) == 14


LONGEST = 24
arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "num_prompt": st.integers(1, LONGEST - 1),
            "num_new": st.integers(1, LONGEST),
            "arrives": st.integers(0, 12),
            "aborts": st.integers(0, 40),
            "priority": st.integers(-1, 1),
            "first": st.sampled_from([0, 0, 0, 100]),
            "salt": st.sampled_from(["", "", "", "salt"]),
            "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals=arrivals,
    extra_pages=st.integers(0, 10),
    max_num_sequences=st.integers(1, 6),
    max_batched_tokens=st.integers(1, 20),
    prefix_caching=st.booleans(),
)
def test_any_mix_ends_with_every_token_drawn_once_and_the_pool_full(
    arrivals, extra_pages, max_num_sequences, max_batched_tokens, prefix_caching
):
    """Whatever arrives, leaves, shares or is preempted: each sequence gets exactly its tokens, and all pages return.

    Every step checks besides that what a sequence reads was computed from its own tokens, that no page has two writers
    or is written while others can find it, and that the page tables account for every holder.
    """
    pool = make_pool(
        -(-LONGEST // PAGE_SIZE) + extra_pages,
        max_num_sequences=max_num_sequences,
        max_batched_tokens=max_batched_tokens,
        prefix_caching=prefix_caching,
    )
    goals, alive, done = {}, {}, []
    for step in range(5_000):
        for index, arrival in enumerate(arrivals):
            if arrival["arrives"] == step:
                options = {name: arrival[name] for name in ("priority", "first", "salt", "prompt_logprobs")}
                sequence = alive[index] = make_sequence(str(index), arrival["num_prompt"], **options)
                goals[index] = min(arrival["num_prompt"] + arrival["num_new"], LONGEST)
                pool.scheduler.add(sequence)
            elif arrival["aborts"] == step and index in alive:
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
        first = sequence.tokens[0]
        assert sequence.tokens == list(range(first, first + len(sequence.tokens)))
    assert pool.allocator.num_free == pool.allocator.num_pages
    assert not pool.scheduler.has_work
    pool.scheduler.check_integrity()

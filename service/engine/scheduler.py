"""Which tokens are computed in the next step. Lists and counters only: no tensors, no model, no clock.

There is no prefill phase and no decode phase (the idea is vLLM v1's): every sequence has tokens that are not computed
yet (a whole prompt, or the one token just drawn), and a step hands out a budget of max_batched_tokens:

    everybody, running or waiting, in one order of rank: lowest priority number first, then whose turn it is among the
    callers (`fair_queue`), then first come
       v
    running   at least one token each; what the budget has left goes in order of rank, to each as much as it lacks.
              One that needs a page when none is free takes it from the running sequence of the last rank, which goes
              back to its place in the queue and is computed again later (preemption by recomputation).
    waiting   admitted at its turn, as long as budget, a place and pages for all its tokens are left, and nobody was
              preempted in this step; the first that cannot be admitted ends admission, so nobody overtakes it.

    waiting --admit--> running --finish/abort--> gone      pages: none in waiting, page_table in running
       ^-----preempt------'

A sequence is admitted with the pages the prefix cache has of it, and starts after them; its last token is always
computed, for somebody has to give the logits. Its own full pages can be found from the step in which they were
computed: by later turns of the same chat, by itself after a preemption.

**Latency.** No more sequences run than the budget has tokens, so every running one progresses in every step, beside
any prompt: between two tokens of a sequence lies one step, and a step computes at most max_batched_tokens. A larger
budget reads prompts in fewer steps, a smaller one makes running sequences wait less for each token.

**Nobody starves within a priority.** Every running sequence progresses in each step in which it is not preempted, and
the one of the first rank never is, because one sequence of max_model_len fits the pool alone (`capacity` refuses to
start otherwise). So somebody always progresses, sequences are finite, and whoever runs leaves in the end. The first of
the queue is overtaken by nobody of its priority but other callers whose turn comes before its own, each finitely often,
so at the latest it is admitted when it is alone. A higher number of priority means what it says: such a sequence waits
for as long as lower ones fill the engine.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from operator import attrgetter

from service.engine.fair_queue import FairQueue
from service.engine.page_allocator import PageAllocator
from service.engine.prefix_cache import extend_keys
from service.engine.sequence import Sequence

_RANK = attrgetter("rank")


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Compute tokens[start : start + length] of a sequence in this step; its pages are there.

    Attributes:
        sequence: whose tokens.
        start: first position, equal to the sequence's num_computed.
        length: tokens, at least 1.
        draws: whether the chunk ends at the sequence's last token, so that its logits give the next one.
    """

    sequence: Sequence
    start: int
    length: int
    draws: bool


class Scheduler:
    """Holds every sequence of the engine and decides who computes what."""

    def __init__(
        self,
        *,
        allocator: PageAllocator,
        page_size: int,
        max_num_sequences: int,
        max_batched_tokens: int,
        prefix_caching: bool = True,
    ) -> None:
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._allocator = allocator
        self._page_size = page_size
        self._budget = max_batched_tokens
        self._max_running = min(max_num_sequences, max_batched_tokens)
        self._prefix_caching = prefix_caching
        self._num_arrived = 0
        self._turns = FairQueue()
        self._waiting: list[Sequence] = []  # both in order of rank
        self._running: list[Sequence] = []

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for pages."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether the next step would compute anything."""
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._num_arrived += 1
        request = sequence.request
        start = self._turns.enter(request.caller, len(request.prompt_token_ids) + request.sampling.max_tokens)
        sequence.rank = (request.priority, start, self._num_arrived)
        insort(self._waiting, sequence, key=_RANK)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and give their sequences the pages they need."""
        chunks: list[Chunk] = []
        budget, position = self._budget, 0
        num_preemptions, admitting = self.num_preemptions, True
        while True:
            unserved = len(self._running) - position  # each of them gets a token, whoever comes before
            if admitting and budget > unserved and self._waiting_is_next(position):
                admitting = self._admit(position)
            if position >= len(self._running):
                return chunks
            sequence = self._running[position]
            others = len(self._running) - position - 1
            length = min(len(sequence.tokens) - sequence.num_computed, budget - others)
            if self._reserve_or_preempt(sequence, length):
                chunks.append(self._chunk(sequence, length))
                budget -= length
            position += 1
            admitting = admitting and self.num_preemptions == num_preemptions

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk's keys and values are in the cache; pages it has filled can be found from now on."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.start + chunk.length
        first, full = chunk.start // self._page_size, sequence.num_computed // self._page_size
        if self._prefix_caching and full > first:
            self._extend_keys(sequence, full)
            for index in range(first, full):
                self._allocator.prefix_cache.keep(sequence.page_table[index], sequence.page_keys[index])

    def distrust(self, sequence: Sequence) -> None:
        """Let nobody find the sequence's pages any more, because what they hold may be wrong."""
        for page in sequence.page_table:
            self._allocator.prefix_cache.forget(page)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its pages.

        Raises:
            ValueError: the scheduler does not hold it.
        """
        if not (_remove(self._running, sequence) or _remove(self._waiting, sequence)):
            raise ValueError(f"sequence {sequence.request_id!r} is not in the scheduler")
        self._release(sequence)
        self._turns.leave(sequence.request.caller)

    def check_integrity(self) -> None:
        """Check that the pool is whole and that exactly the running sequences hold pages.

        Raises:
            AssertionError: a page was lost, or its holders are not those that name it.
        """
        assert not any(sequence.page_table for sequence in self._waiting), "a waiting sequence holds pages"
        self._allocator.check_integrity(sequence.page_table for sequence in self._running)

    def _waiting_is_next(self, position: int) -> bool:
        """Whether the first of the queue ranks before the running sequence at `position`."""
        if not self._waiting:
            return False
        return position == len(self._running) or self._waiting[0].rank < self._running[position].rank

    def _admit(self, position: int) -> bool:
        """Move the first of the queue to `position` of the running ones; False if a place or pages are missing."""
        if len(self._running) >= self._max_running:
            return False
        sequence = self._waiting[0]
        cached = self._find_cached(sequence)
        missing = self._pages_for(len(sequence.tokens)) - len(cached)
        if missing + sum(not self._allocator.is_held(page) for page in cached) > self._allocator.num_free:
            return False
        self._allocator.share(cached)
        sequence.page_table.extend(cached)
        sequence.num_computed = len(cached) * self._page_size
        if sequence.num_preemptions == 0 and self._may_share(sequence):
            sequence.num_cached_tokens = sequence.num_computed
            self.prefix_cache_queries += sequence.num_prompt_tokens
            self.prefix_cache_hits += sequence.num_cached_tokens
        self._running.insert(position, self._waiting.pop(0))
        self._turns.admit(sequence.rank[1])
        return True

    def _may_share(self, sequence: Sequence) -> bool:
        """Whether pages may be looked up; log probabilities of the prompt need every token computed."""
        return self._prefix_caching and sequence.request.sampling.prompt_logprobs is None

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """Return the pages the prefix cache has of a sequence, without the page of its last token."""
        if not self._may_share(sequence):
            return []
        count = (len(sequence.tokens) - 1) // self._page_size
        self._extend_keys(sequence, count)
        return self._allocator.prefix_cache.find(sequence.page_keys[:count])

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        request = sequence.request  # an adapter's keys and values are its own
        salt = f"{len(request.adapter)}:{request.adapter}{request.cache_salt}"
        extend_keys(sequence.page_keys, sequence.tokens, count=count, page_size=self._page_size, salt=salt)

    def _reserve_or_preempt(self, sequence: Sequence, length: int) -> bool:
        """Get pages for a running sequence's next tokens; False if it had to give up its own place for them."""
        while not self._reserve(sequence, length):
            victim = self._running.pop()  # never one that has a chunk already: those come before `sequence`
            self._release(victim)
            victim.num_preemptions += 1
            self.num_preemptions += 1
            insort(self._waiting, victim, key=_RANK)
            if victim is sequence:
                return False
        return True

    def _reserve(self, sequence: Sequence, length: int) -> bool:
        """Extend the page table to hold `length` more computed tokens; False, changing nothing, if too few are free."""
        missing = self._pages_for(sequence.num_computed + length) - len(sequence.page_table)
        if missing <= 0:
            return True
        pages = self._allocator.allocate(missing)
        if pages is None:
            return False
        sequence.page_table.extend(pages)
        return True

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence's pages back; what the prefix cache cannot find later is lost."""
        self._allocator.free(sequence.page_table)
        del sequence.page_table[:]
        sequence.num_computed = 0

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        return Chunk(sequence=sequence, start=start, length=length, draws=start + length == len(sequence.tokens))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)


def _remove(ordered: list[Sequence], sequence: Sequence) -> bool:
    """Remove a sequence from a list in order of rank; False if it is not there."""
    index = bisect_left(ordered, sequence.rank, key=_RANK)
    if index == len(ordered) or ordered[index] is not sequence:
        return False
    del ordered[index]
    return True

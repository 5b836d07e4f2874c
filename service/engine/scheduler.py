"""Which tokens are computed in the next step. Lists and counters only: no tensors, no model, no clock.

There is no prefill phase and no decode phase (the idea is vLLM v1's): every sequence has tokens that are not computed
yet (a whole prompt, or the one token just drawn), and a step hands out a budget of tokens:

    1. running sequences in order of admission, each as much as it lacks and the budget allows;
       one that needs a page when none is free takes it from the sequence admitted last, which goes back to the front
       of the queue and is computed again later (preemption by recomputation);
    2. then waiting sequences in order of arrival, as long as budget, a place and pages for all their tokens are left.

So long prompts are computed in chunks beside the others' single tokens, and nobody starves: at most
max_batched_tokens sequences run, and the one admitted first always progresses, because one sequence of max_model_len
fits the pool alone (`runner` refuses to start otherwise).

    waiting --admit--> running --finish/abort--> gone      pages: none in waiting, page_table in running
       ^-----preempt------'
"""

from collections import deque
from dataclasses import dataclass

from service.engine.page_allocator import PageAllocator
from service.engine.sequence import Sequence


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
        self, *, allocator: PageAllocator, page_size: int, max_num_sequences: int, max_batched_tokens: int
    ) -> None:
        self.num_preemptions = 0
        self._allocator = allocator
        self._page_size = page_size
        self._budget = max_batched_tokens
        self._max_running = min(max_num_sequences, max_batched_tokens)
        self._waiting: deque[Sequence] = deque()
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
        self._waiting.append(sequence)

    def schedule(self) -> list[Chunk]:
        """Choose the next step's chunks and give their sequences the pages they need."""
        preempted_before = self.num_preemptions
        chunks: list[Chunk] = []
        budget = self._budget
        position = 0
        while position < len(self._running) and budget > 0:
            sequence = self._running[position]
            length = min(len(sequence.tokens) - sequence.num_computed, budget)
            if self._reserve_or_preempt(sequence, length):
                chunks.append(self._chunk(sequence, length))
                budget -= length
            position += 1
        if self.num_preemptions == preempted_before:
            self._admit(chunks, budget)
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """Note that a chunk's keys and values are in the cache."""
        chunk.sequence.num_computed = chunk.start + chunk.length

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release(sequence)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Move waiting sequences to running while there is budget, a place, and pages for all their tokens."""
        while self._waiting and budget > 0 and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            if self._pages_for(len(sequence.tokens)) > self._allocator.num_free:
                return
            length = min(len(sequence.tokens), budget)
            reserved = self._reserve(sequence, length)
            assert reserved, "a chunk needs no more pages than the whole sequence"
            self._running.append(self._waiting.popleft())
            chunks.append(self._chunk(sequence, length))
            budget -= length

    def _reserve_or_preempt(self, sequence: Sequence, length: int) -> bool:
        """Get pages for a running sequence's next tokens; False if it had to give up its own place for them."""
        while not self._reserve(sequence, length):
            victim = self._running.pop()  # never one that has a chunk already: those come before `sequence`
            self._release(victim)
            self._waiting.appendleft(victim)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _reserve(self, sequence: Sequence, length: int) -> bool:
        """Extend the page table to hold `length` more computed tokens; False, changing nothing, if too few are free."""
        missing = self._pages_for(sequence.num_computed + length) - len(sequence.page_table)
        pages = self._allocator.allocate(max(missing, 0))
        if pages is None:
            return False
        sequence.page_table.extend(pages)
        return True

    def _release(self, sequence: Sequence) -> None:
        """Take a sequence's pages back; what was computed is lost."""
        self._allocator.free(sequence.page_table)
        del sequence.page_table[:]
        sequence.num_computed = 0

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        return Chunk(sequence=sequence, start=start, length=length, draws=start + length == len(sequence.tokens))

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

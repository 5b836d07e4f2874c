"""Where sequences wait until their grammars are compiled: a thread beside the loop, so that no step waits for it.

loop --submit--> [sequences] --thread: compile--> Compiled --> the loop's inbox
loop --leave---> forgotten; a Compiled that comes nevertheless is of nobody who waits
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from service.engine.grammar import GrammarState
from service.engine.sequence import Sequence
from service.engine.types import Grammar


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A sequence's grammar is ready, or cannot be compiled."""

    sequence: Sequence
    state: GrammarState | None
    error: str | None = None


class GrammarDesk:
    """Sequences that wait for their grammars.

    Args:
        compile_grammar: called in the desk's own thread; what it raises is the sequence's error.
        deliver: called in that thread with every result.
    """

    def __init__(self, compile_grammar: Callable[[Grammar], GrammarState], deliver: Callable[[Compiled], None]) -> None:
        self._compile_grammar = compile_grammar
        self._deliver = deliver
        self._waiting: dict[str, Sequence] = {}
        self._queue: SimpleQueue[tuple[Sequence, Grammar]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return len(self._waiting)

    def submit(self, sequence: Sequence, grammar: Grammar) -> None:
        """Let a sequence wait for its grammar."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._compile_all, name="engine-grammar", daemon=True)
            self._thread.start()
        self._waiting[sequence.request_id] = sequence
        self._queue.put((sequence, grammar))

    def waits(self, sequence: Sequence) -> bool:
        """Whether a sequence waits here."""
        return self._waiting.get(sequence.request_id) is sequence

    def leave(self, sequence: Sequence) -> bool:
        """Take a sequence from the desk; False if it does not wait there."""
        if not self.waits(sequence):
            return False
        del self._waiting[sequence.request_id]
        return True

    def _compile_all(self) -> None:
        while True:
            sequence, grammar = self._queue.get()
            if not self.waits(sequence):
                continue  # it left before its turn
            try:
                compiled = Compiled(sequence=sequence, state=self._compile_grammar(grammar))
            except Exception as error:  # noqa: BLE001  (whatever the compiler raises belongs to this grammar)
                compiled = Compiled(sequence=sequence, state=None, error=str(error) or type(error).__name__)
            self._deliver(compiled)

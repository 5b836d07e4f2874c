"""Whose turn it is: start-time fair queueing (Goyal, Vin, Cheng 1996) over callers, a request's tokens as its cost.

    start(request)  = max(now, finish(caller))       now = the latest start that was admitted
    finish(caller)  = start(request) + tokens(request)

The scheduler admits by priority, then by start. A caller alone gets its requests in order. A caller with two hundred
waiting has spread them over two hundred requests' worth of virtual time, while the first of another starts now: it is
next, whatever the first caller has queued. So callers that always have work get equal shares of tokens, and one that
asks seldom waits for a sequence to end, not for a queue. (That counting tokens is the right measure for language models
is Sheng et al., OSDI 2024, arXiv:2401.00588.)

Starts only grow, and nobody who enters starts before one who runs, so a newcomer never ranks before a running sequence
of its priority; and whoever waits is overtaken by other callers only until their starts have passed its own.
"""

from collections import Counter


class FairQueue:
    """Gives each request its start."""

    def __init__(self) -> None:
        self._now = 0
        self._finish: dict[str, int] = {}
        self._num_open: Counter[str] = Counter()

    def enter(self, caller: str, num_tokens: int) -> int:
        """Note a new request, and return its start."""
        start = max(self._now, self._finish.get(caller, 0))
        self._finish[caller] = start + max(1, num_tokens)
        self._num_open[caller] += 1
        return start

    def admit(self, start: int) -> None:
        """Note that the request with this start begins to be computed."""
        self._now = max(self._now, start)

    def leave(self, caller: str) -> None:
        """Note that a request is gone; a caller without any begins anew, owing nothing."""
        self._num_open[caller] -= 1
        if not self._num_open[caller]:
            del self._num_open[caller]
            del self._finish[caller]

"""How long a call takes, in a way that a shared machine and a warm cache cannot flatter.

Contestants take turns (A B A B ...): whatever else the machine does in that second hits all of them, and a ratio of
medians survives it. A turn is as many calls as fill a few milliseconds, because a clock read costs as much as a small
product. On a GPU a turn is one replay of a CUDA graph, so the time is the kernel's and not that of launching it from
Python.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], Tensor]
Turn = Callable[[], float]

TURN_SECONDS = 0.004
GRAPH_CALLS = 24
"""At least, per graph: starting the replay costs microseconds, which must be shared by many kernels."""


@dataclass(frozen=True)
class Player:
    """A contestant that takes turns.

    Attributes:
        calls: the same product on different copies of the weight.
        before: brings the library into the right state; not timed.
    """

    calls: Sequence[Call]
    before: Callable[[], None]


def make_turn(player: Player, *, device: str, hot: bool) -> Turn:
    """Warm a contestant up and return what times one turn of it.

    Args:
        player: the contestant.
        device: where it runs.
        hot: repeat one copy, and spend an untimed call at the start of a turn to bring it back into the cache.
    """
    return _cpu_turn(player, hot=hot) if device == "cpu" else _graph_turn(player.calls)


def interleaved_medians(turns: Mapping[str, Turn], repetitions: int) -> dict[str, float]:
    """Let all contestants take turns so often; return the median seconds of a call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(repetitions):
        for name, turn in turns.items():
            seconds[name].append(turn())
    return {name: statistics.median(values) for name, values in seconds.items()}


def _cpu_turn(player: Player, *, hot: bool) -> Turn:
    """Return a function that times one turn; it remembers which copy comes next."""
    calls = player.calls
    player.before()
    calls[0]()
    start = time.perf_counter()
    calls[0]()
    once = time.perf_counter() - start
    count = max(1, min(1000, round(TURN_SECONDS / max(once, 1e-7))))
    place = 0

    def turn() -> float:
        nonlocal place
        player.before()
        if hot:
            calls[0]()
        order = [calls[0 if hot else (place + number) % len(calls)] for number in range(count)]
        place += count
        begin = time.perf_counter()
        for call in order:
            call()
        return (time.perf_counter() - begin) / count

    return turn


def _graph_turn(calls: Sequence[Call]) -> Turn:
    """Return a function that times one replay of a graph over all copies."""
    rounds = -(-GRAPH_CALLS // len(calls))
    for call in (*calls[:2], *calls[:2]):  # compiles, tunes and allocates before the capture
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    torch.cuda.synchronize()

    def turn() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / (rounds * len(calls))

    return turn


def copies_for(weight_bytes: int, *, target_bytes: int, limit_bytes: int) -> int:
    """Return how many copies of a weight exceed a cache: at least target_bytes in all, at most limit_bytes.

    One copy of a weight above the limit is already larger than the cache, or the limit was chosen too small; two are
    kept where they fit, so that no call reads what the one before left behind.
    """
    wanted = max(2, -(-target_bytes // weight_bytes))
    return max(1, min(wanted, limit_bytes // weight_bytes))

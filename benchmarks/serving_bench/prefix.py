"""What the prefix cache saves: time to first token of a long prompt that is new, and of the same prompt again.

The second time, a server that kept the prompt's keys and values has only its end to compute. Every prompt is asked
three times: new (miss), and twice again (hits, of which the median counts).
"""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.serving_bench.load import run_load
from benchmarks.serving_bench.process import RunningServer
from benchmarks.serving_bench.results import ServerLine, shown

REPETITIONS = 2
OUTPUT_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One prompt.

    Attributes:
        miss_ms: time to first token when it was new.
        hit_ms: and when it was asked again.
    """

    miss_ms: float
    hit_ms: float


@dataclass(frozen=True, kw_only=True)
class PrefixLine(ServerLine):
    """One server.

    Attributes:
        prompt_tokens: of every prompt.
        prompts: how many.
        miss_ms: median time to first token of new prompts.
        hit_ms: median of the same prompts again.
        hit_over_miss: median over the prompts of their own ratio.
    """

    prompt_tokens: int
    prompts: int
    miss_ms: float
    hit_ms: float
    hit_over_miss: float


def measure_prefix(server: RunningServer, prompts: Sequence[str]) -> list[Pair]:
    """Ask every prompt, then again; a prompt that failed is left out."""
    server.resume()
    pairs = []
    for prompt in prompts:
        asked = [prompt] * (1 + REPETITIONS)
        traces = asyncio.run(run_load(server.target, asked, output_tokens=OUTPUT_TOKENS, concurrency=1))
        if not any(trace.error for trace in traces):
            miss, *hits = (1e3 * trace.first_token_seconds for trace in traces)
            pairs.append(Pair(miss_ms=miss, hit_ms=statistics.median(hits)))
    server.pause()
    return pairs


def prefix_lines(
    pairs: Mapping[str, Sequence[Pair]], versions: Mapping[str, str], common: Mapping[str, Any], tokens: int
) -> list[PrefixLine]:
    """Return a line a server that answered."""
    return [
        PrefixLine(
            **common,
            server=server,
            version=versions[server],
            prompt_tokens=tokens,
            prompts=len(of_server),
            miss_ms=statistics.median(pair.miss_ms for pair in of_server),
            hit_ms=statistics.median(pair.hit_ms for pair in of_server),
            hit_over_miss=statistics.median(pair.hit_ms / pair.miss_ms for pair in of_server),
        )
        for server, of_server in pairs.items()
        if of_server
    ]


def prefix_table(lines: Sequence[PrefixLine]) -> Table:
    """Return the table of a run."""
    title = f"{lines[0].model}: time to first token of {lines[0].prompt_tokens} tokens"
    table = Table("server", title=title, title_justify="left")
    for name in ("new, ms", "again, ms", "again over new"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(line.server, shown(line.miss_ms), shown(line.hit_ms), f"{100 * line.hit_over_miss:.0f} %")
    return table

"""What is written down: one line of CSV a server and concurrency, and the table in the terminal.

A round gives one Measure; a line holds the medians over the rounds. `ratio_to_first` above 1 means that the first
server named on the command line writes more tokens a second than this one.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.kernel_bench.results import write_table
from benchmarks.serving_bench.load import Trace


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One server at one concurrency in one round.

    Attributes:
        tokens_per_s: written by the requests that went well, over the time from the first sent to the last ended.
        ttft_ms: time to first token of every request that went well.
        itl_ms: every gap between two pieces of text.
        prompt_tokens: of a request, as the server counts them.
        requests: in all.
        errors: of them, those that failed or were too short.
        first_error: what the first of these said.
        cpu_ms_per_token: processor time of the server's processes over tokens written.
        memory_mib: of the server's processes together, shared pages once.
    """

    tokens_per_s: float
    ttft_ms: Sequence[float]
    itl_ms: Sequence[float]
    prompt_tokens: int
    requests: int
    errors: int
    first_error: str
    cpu_ms_per_token: float
    memory_mib: float


@dataclass(frozen=True, kw_only=True)
class ServerLine:
    """What every line says of its run and its server.

    Attributes:
        device: processor with its instruction sets, or GPU.
        date: of the run, UTC.
        command: that repeats it.
        threads: every server was given.
        model: that all of them serve.
        server: who, with the weights it was given.
        version: of it.
    """

    device: str
    date: str
    command: str
    threads: int
    model: str
    server: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Line(ServerLine):
    """One server at one concurrency: medians over the rounds; quantiles over a round's requests come first.

    Attributes:
        concurrency: requests in flight.
        prompt_tokens: of a request, as the server counts them.
        output_tokens: of a request.
        requests: in a round.
        rounds: turns of every server.
        errors: requests that failed, in all rounds.
        tokens_per_s: written, all requests together.
        tokens_per_s_least: of the slowest round.
        tokens_per_s_most: of the fastest round.
        ttft_ms_median: time to first token.
        ttft_ms_p90: the same.
        itl_ms_median: between two pieces of text of a request.
        itl_ms_p90: the same.
        cpu_ms_per_token: processor time of the server over tokens written: what a busy machine changes least.
        memory_mib: of the server's processes.
        ratio_to_first: tokens_per_s of the first server over this one's.
    """

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int
    rounds: int
    errors: int
    tokens_per_s: float
    tokens_per_s_least: float
    tokens_per_s_most: float
    ttft_ms_median: float | None
    ttft_ms_p90: float | None
    itl_ms_median: float | None
    itl_ms_p90: float | None
    cpu_ms_per_token: float
    memory_mib: float
    ratio_to_first: float | None


COLUMNS = tuple(field.name for field in fields(Line))


def measured(traces: Sequence[Trace], *, cpu_seconds: float, memory_mib: float) -> Measure:
    """Summarize what the requests of one round met."""
    good = [trace for trace in traces if not trace.error]
    bad = [trace for trace in traces if trace.error]
    seconds = max(trace.ended for trace in traces) - min(trace.sent for trace in traces)
    tokens = sum(trace.output_tokens for trace in good)
    return Measure(
        tokens_per_s=tokens / seconds,
        ttft_ms=[1e3 * trace.first_token_seconds for trace in good],
        itl_ms=[1e3 * gap for trace in good for gap in trace.gaps],
        prompt_tokens=round(statistics.median([trace.prompt_tokens for trace in good] or [0])),
        requests=len(traces),
        errors=len(bad),
        first_error=bad[0].error if bad else "",
        cpu_ms_per_token=1e3 * cpu_seconds / tokens if tokens else 0.0,
        memory_mib=memory_mib,
    )


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the value below which this share of the others lies, between neighbours in proportion; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def medians(rounds: Sequence[Measure]) -> dict[str, Any]:
    """Return the measured columns of a line: the median over the rounds of each round's own statistics."""
    speeds = [one.tokens_per_s for one in rounds]
    return {
        "prompt_tokens": round(statistics.median(one.prompt_tokens for one in rounds)),
        "requests": rounds[0].requests,
        "rounds": len(rounds),
        "errors": sum(one.errors for one in rounds),
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_least": min(speeds),
        "tokens_per_s_most": max(speeds),
        "ttft_ms_median": _median_of([quantile(one.ttft_ms, 0.5) for one in rounds]),
        "ttft_ms_p90": _median_of([quantile(one.ttft_ms, 0.9) for one in rounds]),
        "itl_ms_median": _median_of([quantile(one.itl_ms, 0.5) for one in rounds]),
        "itl_ms_p90": _median_of([quantile(one.itl_ms, 0.9) for one in rounds]),
        "cpu_ms_per_token": statistics.median(one.cpu_ms_per_token for one in rounds),
        "memory_mib": statistics.median(one.memory_mib for one in rounds),
    }


def _median_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def ratio(first: float, other: float) -> float | None:
    """Return how many times faster the first is; None where the other did nothing."""
    return first / other if other else None


def write_rows(file: Path, rows: Iterable[Any]) -> None:
    """Write the whole file, one row a dataclass; four digits of a measurement."""
    write_table(file, [{key: shown(value) for key, value in asdict(row).items()} for row in rows])


def shown(value: Any) -> Any:
    """Keep four digits of a measurement, and nothing of what is not there."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else value


def load_table(lines: Sequence[Line]) -> Table:
    """Return the table of a run, servers by concurrency."""
    first = lines[0]
    title = f"{first.model}: {first.output_tokens} tokens after {first.prompt_tokens}, {first.threads} threads"
    table = Table(title=title, title_justify="left")
    for name in ("at once", "server", "tokens/s", "first is", "first token, ms", "next token, ms"):
        table.add_column(name, justify="left" if name == "server" else "right", no_wrap=True)
    for name in ("CPU ms/token", "MiB", "errors"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, line in enumerate(lines):
        ends_section = number + 1 == len(lines) or lines[number + 1].concurrency != line.concurrency
        table.add_row(
            str(line.concurrency),
            line.server,
            shown(line.tokens_per_s),
            "" if line.ratio_to_first is None else f"{line.ratio_to_first:.2f}x",
            _pair(line.ttft_ms_median, line.ttft_ms_p90),
            _pair(line.itl_ms_median, line.itl_ms_p90),
            shown(line.cpu_ms_per_token),
            f"{line.memory_mib:.0f}",
            str(line.errors),
            end_section=ends_section,
        )
    table.caption = "medians over the rounds; in brackets: nine of ten are below"
    return table


def _pair(median: float | None, p90: float | None) -> str:
    return "" if median is None or p90 is None else f"{shown(median)} ({shown(p90)})"

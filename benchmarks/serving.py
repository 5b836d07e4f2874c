"""How fast our server answers many users at once, against other servers with the same model on the same machine.

    python -m benchmarks.serving ARTIFACT... --rivals DIR       # make bench-serving ARGS="..."
    python -m benchmarks.serving ARTIFACT --rivals DIR --prefix # time to first token: prefix cached or not

Every server is a real process and gets the same requests from one client: so many at once, each asking again as soon
as it has its answer; prompts are windows of a text, all different, completions greedy and of equal length. Servers take
turns (A B C, A B C, ...) and medians over the rounds are compared, so a busy machine hits all of them; who is not
measured is stopped. A wrong answer is not looked for here: tests do that.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.decode import make_artifact
from benchmarks.kernel_bench.device import device_name
from benchmarks.kernel_bench.results import output_file, shown_command
from benchmarks.serving_bench.contestants import Contestant, Plan, ours, rivals
from benchmarks.serving_bench.load import run_load
from benchmarks.serving_bench.prefix import measure_prefix, prefix_lines, prefix_table
from benchmarks.serving_bench.process import RunningServer, ServerFailed
from benchmarks.serving_bench.prompts import PromptSource
from benchmarks.serving_bench.results import Line, Measure, load_table, measured, medians, ratio, write_rows
from onebit_core.calibration.sources import read_text
from onebit_core.errors import OnebitError
from onebit_core.model.loading import find_folder, read_tokenizer
from onebit_core.model.sample import sample_model_path

WARM_UP_TOKENS = 16
WARM_UP_TRIES = 3
SEEDS_PER_ROUND = 1_000
PAGE_COLUMNS = 140


def main() -> int:
    """Start everybody, measure, write, print."""
    options = arguments()
    try:
        source = PromptSource(read_tokenizer(find_folder(options.model)), read_text(options.text))
        tokens = options.prefix_tokens + 2 * WARM_UP_TOKENS if options.prefix else options.input + options.output
        sequences = 1 if options.prefix else max(options.concurrency)
        plan = Plan(threads=options.threads, sequences=sequences, tokens=tokens)
        artifacts = options.artifacts or [make_artifact(options.work)]
        contestants = [ours(artifact, plan, tuple(options.serve_flag)) for artifact in artifacts]
        if options.rivals:
            contestants += rivals(options.rivals, options.model, options.gguf, options.work, plan)
    except (OnebitError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with ExitStack() as running:
        servers = start(contestants, options.work, running)
        if not servers:
            return 1
        measure = run_prefix if options.prefix else run_rounds
        return measure(servers, source, options)


def start(contestants: Sequence[Contestant], work: Path, running: ExitStack) -> list[RunningServer]:
    """Start all that can be started, one after the other, and pause each; the others are named and left out."""
    servers = []
    for number, contestant in enumerate(contestants):
        server = running.enter_context(RunningServer(contestant, work / f"server-{number}.log"))
        try:
            server.wait_until_ready()
        except ServerFailed as failure:
            print(f"left out: {contestant.name}: {failure}", file=sys.stderr)
            continue
        print(f"ready: {contestant.name}, version {contestant.version}", file=sys.stderr, flush=True)
        server.pause()
        servers.append(server)
    return servers


def run_rounds(servers: Sequence[RunningServer], source: PromptSource, options: argparse.Namespace) -> int:
    """Let servers take turns at every concurrency, then write the CSV and show the table."""
    servers = [server for server in servers if is_warm(server, source)]
    if not servers:
        return 1
    contestants = [server.contestant for server in servers]
    measures: dict[int, list[list[Measure]]] = {many: [[] for _ in servers] for many in options.concurrency}
    lines: list[Line] = []
    for number in range(options.rounds):
        for concurrency in options.concurrency:
            count = max(options.least_requests, concurrency * options.requests_per_client)
            prompts = source.prompts(count, options.input, options.seed + number * SEEDS_PER_ROUND + concurrency)
            for server, of_server in zip(servers, measures[concurrency], strict=True):
                of_server.append(one_turn(server, prompts, options.output, concurrency))
                tell(number + 1, concurrency, server.contestant, of_server[-1])
            lines = all_lines(measures, contestants, common(options), options.output)
            write_rows(file_of(options, "serving"), lines)
    show(load_table(lines))
    return 1 if any(line.errors for line in lines) else 0


def tell(number: int, concurrency: int, contestant: Contestant, measure: Measure) -> None:
    """Say what one turn gave, on standard error."""
    said = f"round {number}, {concurrency} at once, {contestant.name}: {measure.tokens_per_s:.4g} tokens/s"
    said += f"; {measure.errors} errors, the first: {measure.first_error}" if measure.errors else ""
    print(said, file=sys.stderr, flush=True)


def one_turn(server: RunningServer, prompts: Sequence[str], output_tokens: int, concurrency: int) -> Measure:
    """Wake a server, give it the load, put it back to sleep."""
    server.resume()
    before = server.cpu_seconds()
    traces = asyncio.run(run_load(server.target, prompts, output_tokens=output_tokens, concurrency=concurrency))
    used = server.cpu_seconds() - before
    memory = server.memory_mib()
    server.pause()
    return measured(traces, cpu_seconds=used, memory_mib=memory)


def is_warm(server: RunningServer, source: PromptSource) -> bool:
    """Ask a few things that do not count: what is compiled or allocated at first use is then there.

    One after the other, and again if one failed: `transformers serve` now and then drops its very first connection.
    """
    prompts = source.prompts(2, WARM_UP_TOKENS, seed=0)
    errors = ["not asked"]
    server.resume()
    for _ in range(WARM_UP_TRIES):
        traces = asyncio.run(run_load(server.target, prompts, output_tokens=WARM_UP_TOKENS, concurrency=1))
        errors = [trace.error for trace in traces if trace.error]
        if not errors:
            break
    server.pause()
    if errors:
        print(f"left out: {server.contestant.name}: {errors[0]}", file=sys.stderr)
    return not errors


def all_lines(
    measures: Mapping[int, Sequence[Sequence[Measure]]],
    contestants: Sequence[Contestant],
    shared: Mapping[str, Any],
    output_tokens: int,
) -> list[Line]:
    """Return a line for every concurrency and contestant.

    Args:
        measures: by concurrency, then in the order of the contestants, then by round; no round yet leaves no line.
        contestants: the first is the one the others are compared with.
        shared: columns that are the same everywhere.
        output_tokens: asked for.
    """
    lines = []
    for concurrency, of_servers in measures.items():
        values = [medians(rounds) for rounds in of_servers if rounds]
        for contestant, of_server in zip(contestants, values, strict=False):
            lines.append(
                Line(
                    **shared,
                    server=contestant.name,
                    version=contestant.version,
                    concurrency=concurrency,
                    output_tokens=output_tokens,
                    ratio_to_first=ratio(values[0]["tokens_per_s"], of_server["tokens_per_s"]),
                    **of_server,
                )
            )
    return lines


def run_prefix(servers: Sequence[RunningServer], source: PromptSource, options: argparse.Namespace) -> int:
    """Measure time to first token of a long prompt that is new, and again."""
    servers = [server for server in servers if is_warm(server, source)]
    prompts = source.prompts(options.rounds, options.prefix_tokens, options.seed)
    pairs = {server.contestant.name: measure_prefix(server, prompts) for server in servers}
    versions = {server.contestant.name: server.contestant.version for server in servers}
    lines = prefix_lines(pairs, versions, common(options), options.prefix_tokens)
    if not lines:
        return 1
    write_rows(file_of(options, "serving-prefix"), lines)
    show(prefix_table(lines))
    return 0


def show(table: Table) -> None:
    """Print a table, as wide as it is where nobody says how wide the terminal is."""
    console = Console()
    Console(width=console.width if console.is_terminal else PAGE_COLUMNS).print(table)


def common(options: argparse.Namespace) -> dict[str, Any]:
    """Return the columns that every line of a run shares."""
    return {
        "device": device_name("cpu"),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": shown_command("benchmarks.serving", sys.argv[1:]),
        "threads": options.threads,
        "model": Path(options.model).stem,
    }


def file_of(options: argparse.Namespace, kind: str) -> Path:
    """Return the CSV file of this run."""
    values = common(options)
    return output_file(options.out, kind, str(values["device"]), str(values["date"]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("artifacts", nargs="*", type=Path, help="a server each; the first is compared with; default: made under --work")
    add("--rivals", type=Path, help="folder of the rivals' environments, see benchmarks/README.md")
    add("--model", help="the original: Hugging Face folder or GGUF file; default: the sample model")
    add("--gguf", action="append", type=Path, help="file for llama.cpp; again for another; default: the sample model's")
    add("--serve-flag", action="append", default=[], metavar="FLAG", help="for our server, e.g. --serve-flag=--x=1")
    add("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64])
    add("--input", type=int, default=64, help="tokens of a prompt")
    add("--output", type=int, default=128, help="tokens of a completion")
    add("--requests-per-client", type=int, default=2, help="how often each of the concurrent clients asks in a round")
    add("--least-requests", type=int, default=4, help="in a round")
    add("--rounds", type=int, default=3, help="turns of every server; medians count")
    add("--prefix", action="store_true", help="measure what the prefix cache saves instead")
    add("--prefix-tokens", type=int, default=2000, help="tokens of its prompts")
    add("--text", default="builtin:python", help="where prompts are cut from; default: what comes with Python")
    add("--seed", type=int, default=1)
    add("--threads", type=int, default=os.cpu_count() or 1, help="of every server")
    add("--work", type=Path, default=Path("build/serving"), help="for logs and the rivals' copy of the model")
    add("--out", type=Path, help="CSV file, or the folder of serving_<device>_<date>.csv")
    options = parser.parse_args()
    options.model = options.model or str(sample_model_path())
    options.gguf = options.gguf or [Path(options.model)] * options.model.endswith(".gguf")
    return options


if __name__ == "__main__":
    sys.exit(main())

"""`python -m tests.chaos`: kill things at random, then count what was lost. Exit status 0 if nothing was."""

import argparse
import csv
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.kernel_bench.device import device_name
from benchmarks.kernel_bench.results import output_file, shown_command
from tests.chaos.cluster import Cluster
from tests.chaos.jobs import Poster, Verdict, judge, onebit, undisturbed
from tests.chaos.traffic import PROMPTS, Traffic, ask, connect
from tests.support.server_process import running_server
from tests.support.tiny_model import save_tiny_model

SEEDS = (None, 1)
MODEL = "served"
VICTIMS = ("worker", "child", "engine", "server", "database", "stopped worker")
START_SECONDS = 240.0


class Killer:
    """Kills at random until it has killed often enough."""

    def __init__(self, cluster: Cluster, draw: random.Random) -> None:
        self._cluster = cluster
        self._draw = draw
        self.killed: Counter[str] = Counter()
        self._later: list[threading.Thread] = []

    def run(self, kills: int, seconds_between: float) -> None:
        """Kill, wait, and kill again."""
        while sum(self.killed.values()) < kills:
            time.sleep(self._draw.uniform(0.2, 2 * seconds_between))
            victim = self._draw.choice(VICTIMS)
            if self._kill(victim):
                self.killed[victim] += 1
                print(f"{sum(self.killed.values()):4} of {kills}: {victim}", flush=True)
        for thread in self._later:
            thread.join()

    def _kill(self, victim: str) -> bool:
        """Kill one; False if there is none of its kind now."""
        cluster, draw = self._cluster, self._draw
        if victim == "database":
            cluster.crash_database(draw.uniform(0.5, 4.0))
            return True
        if victim in ("server", "worker"):
            kept = draw.choice(cluster.servers if victim == "server" else cluster.workers)
            if kept.process is None:
                return False
            kept.kill()
            return True
        if victim == "stopped worker":
            kept = draw.choice(cluster.workers)
            kept.kill(signal.SIGSTOP)
            self._after(draw.uniform(5.0, 15.0), lambda: kept.kill(signal.SIGCONT))
            return True
        word, hosts = {
            "child": ("onebit_core.cli.main", cluster.workers),
            "engine": ("multiprocessing.spawn", cluster.servers),
        }[victim]
        found = [process for host in hosts for process in host.children(word)]
        if not found:
            return False
        draw.choice(found).kill()
        return True

    def _after(self, seconds: float, what: object) -> None:
        thread = threading.Timer(seconds, what)  # type: ignore[arg-type]
        thread.start()
        self._later.append(thread)


def main() -> int:
    """Set up, kill, judge, write."""
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="onebit-chaos-") as name:
        return run(Path(name), options)


def run(folder: Path, options: argparse.Namespace) -> int:
    """Do all of it under one folder."""
    sources = folder / "sources"
    model = save_tiny_model(sources / "model", num_layers=4)
    expected_hashes = undisturbed(model, folder)
    artifact = folder / MODEL
    onebit(
        "quantize",
        str(model),
        "--out",
        str(artifact),
        "--method",
        "rtn",
        "--set",
        "bits=4",
        "--name",
        MODEL,
        "--progress",
        "none",
    )
    expected = undisturbed_answers(artifact, folder)
    cluster = Cluster(folder, artifact, sources, servers=options.servers, workers=options.workers)
    started = time.monotonic()
    with cluster.running():
        wait_for_answers(cluster.url, expected)
        traffic = Traffic(url=cluster.url, model=MODEL, expected=expected)
        poster = Poster(cluster.url, model, max(4, options.kills // 10), 8 * options.seconds_between)
        killer = Killer(cluster, random.Random(options.seed))
        traffic.start(options.clients)
        poster.start()
        killer.run(options.kills, options.seconds_between)
        poster.wait()
        killing = time.monotonic() - started
        verdict = judge(cluster.url, cluster.root, expected_hashes, poster.ids, options.last_seconds)
        traffic.stop()
        wait_for_answers(cluster.url, expected)
    figures = figures_of(killer, poster, verdict, traffic, killing)
    for figure, value in figures.items():
        print(f"{figure:42} {value}")
    for trouble in (*verdict.not_succeeded, *verdict.wrong_artifacts, *verdict.leftovers, *traffic.wrong[:5]):
        print("!!", trouble)
    print("outcomes", dict(traffic.outcomes))
    if options.out is not None:
        write(options, figures)
    other = figures["other outcomes"]
    return 0 if verdict.is_clean and not traffic.wrong and not other and traffic.outcomes["right"] else 1


def figures_of(killer: Killer, poster: Poster, verdict: Verdict, traffic: Traffic, seconds: float) -> dict[str, object]:
    """Return everything that was counted."""
    known = ("right", "wrong", "refused", "cut")
    figures: dict[str, object] = {f"kills of {victim}": killer.killed[victim] for victim in VICTIMS}
    figures |= {
        "kills": sum(killer.killed.values()),
        "seconds of killing": round(seconds),
        "jobs posted": verdict.posted,
        "jobs lost": verdict.lost,
        "jobs doubled": verdict.doubled,
        "jobs not succeeded": len(verdict.not_succeeded),
        "artifacts with other bytes": len(verdict.wrong_artifacts),
        "half-written artifacts left": len(verdict.leftovers),
        "posts refused and repeated": poster.refusals,
        "answers right": traffic.outcomes["right"],
        "answers wrong": traffic.outcomes["wrong"],
        "requests refused": traffic.outcomes["refused"],
        "answers cut off": traffic.outcomes["cut"],
        "other outcomes": sum(count for kind, count in traffic.outcomes.items() if kind not in known),
        "longest time without a right answer, s": round(traffic.longest_gap, 1),
    }
    return figures


def undisturbed_answers(artifact: Path, folder: Path) -> dict[tuple[str, int | None], str]:
    """Ask a server that nobody disturbs."""
    with running_server(str(artifact), "--max-model-len", "256", log_file=folder / "first.log") as server:
        client = connect(server.url)
        return {(prompt, seed): ask(client, MODEL, prompt, seed, stream=False) for prompt in PROMPTS for seed in SEEDS}


def wait_for_answers(url: str, expected: dict[tuple[str, int | None], str]) -> None:
    """Wait until every question is answered, rightly."""
    client = connect(url)
    deadline = time.monotonic() + START_SECONDS
    for (prompt, seed), text in expected.items():
        while True:
            try:
                assert ask(client, MODEL, prompt, seed, stream=False) == text
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def write(options: argparse.Namespace, figures: dict[str, object]) -> None:
    """Write the CSV."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    device = device_name("cpu")
    out = output_file(options.out, "chaos", device.partition(" (")[0], date[:10])
    out.parent.mkdir(parents=True, exist_ok=True)
    command = shown_command("tests.chaos", sys.argv[1:])
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("device", "date", "command", "figure", "value"))
        writer.writerows((device, date, command, figure, value) for figure, value in figures.items())
    print(out)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds-between", type=float, default=4.0, help="on average")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")
    parser.add_argument("--last-seconds", type=float, default=900.0, help="how long jobs may take after the last kill")
    parser.add_argument("--out", type=Path, help="CSV file, or the folder of chaos_<device>_<date>.csv")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

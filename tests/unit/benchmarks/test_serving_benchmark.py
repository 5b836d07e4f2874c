"""The serving benchmark: its prompts, its client against a scripted server, its statistics, its CSV and table."""

import asyncio
import csv
import dataclasses
import io
import json
import statistics

import pytest
from rich.console import Console

from benchmarks.serving import all_lines
from benchmarks.serving_bench.contestants import Contestant, endless_folder, rivals
from benchmarks.serving_bench.contestants import Plan as ServingPlan
from benchmarks.serving_bench.load import Target, Trace, run_load
from benchmarks.serving_bench.prefix import Pair, prefix_lines, prefix_table
from benchmarks.serving_bench.prompts import PromptSource
from benchmarks.serving_bench.results import load_table, measured, medians, quantile, ratio, write_rows
from tests.support.tiny_model import byte_tokenizer

TEXT = "".join(f"Sentence number {number} says {number * number}. " for number in range(400))
COMMON = {"device": "Some CPU", "date": "2026-01-02", "command": "python", "threads": 2, "model": "tiny"}


def trace(sent=0.0, arrivals=(0.5, 0.75, 1.25), ended=1.5, output_tokens=3, error=""):
    return Trace(
        sent=sent,
        arrivals=list(arrivals),
        ended=ended,
        prompt_tokens=7,
        output_tokens=output_tokens,
        error=error,
    )


def measure(traces, cpu_seconds=0.6, memory_mib=100.0):
    return measured(traces, cpu_seconds=cpu_seconds, memory_mib=memory_mib)


def test_prompts_are_different_windows_of_an_exact_length():
    """Each survives the way to text and back, equal seeds give equal ones, other seeds others."""
    tokenizer = byte_tokenizer()
    source = PromptSource(tokenizer, TEXT)
    prompts = source.prompts(50, 40, seed=3)
    assert len(set(prompts)) == 50
    assert {len(tokenizer(prompt)["input_ids"]) for prompt in prompts} == {40}
    assert all(prompt in TEXT for prompt in prompts)
    assert source.prompts(50, 40, seed=3) == prompts
    assert not set(source.prompts(50, 40, seed=4)) & set(prompts[:5])


def test_a_text_too_short_for_the_prompts_is_refused():
    """The sentence says what to do."""
    with pytest.raises(ValueError, match="--text"):
        PromptSource(byte_tokenizer(), "abc").prompts(1, 40, seed=0)
    with pytest.raises(ValueError, match="different prompts"):
        PromptSource(byte_tokenizer(), "a" * 50).prompts(2, 40, seed=0)


def test_a_measure_counts_tokens_over_the_whole_time():
    """From the first sent to the last ended, failed requests' time included but not their tokens."""
    traces = [trace(), trace(sent=1.0, arrivals=(2.0, 2.5, 3.5), ended=4.0), trace(ended=5.0, error="status 500: x")]
    one = measure(traces)
    assert one.tokens_per_s == pytest.approx(6 / 5.0)
    assert one.ttft_ms == pytest.approx([500.0, 1000.0])
    assert one.itl_ms == pytest.approx([250.0, 500.0, 500.0, 1000.0])
    assert (one.requests, one.errors, one.first_error) == (3, 1, "status 500: x")
    assert one.cpu_ms_per_token == pytest.approx(100.0)
    assert one.prompt_tokens == 7


def test_a_round_without_any_success_has_no_times():
    """No division by nothing; the ratio to it is none."""
    one = measure([trace(error="gone")])
    assert (one.tokens_per_s, one.cpu_ms_per_token, one.ttft_ms) == (0.0, 0.0, [])
    values = medians([one])
    assert values["ttft_ms_median"] is None
    assert ratio(10.0, values["tokens_per_s"]) is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_are_those_of_the_statistics_module(share):
    """Between neighbours in proportion."""
    values = [5.0, 1.0, 4.0, 9.0, 2.0, 7.0]
    cuts = [min(values), *statistics.quantiles(values, n=10, method="inclusive"), max(values)]
    assert quantile(values, share) == pytest.approx(cuts[round(10 * share)])
    assert quantile([], share) is None
    assert quantile([3.0], share) == 3.0


def test_medians_are_over_rounds_not_over_requests():
    """A slow round with many requests does not decide."""
    fast = measure([trace()])
    slow = measure([trace(arrivals=(5.0, 6.0, 7.0), ended=9.0)] * 10)
    values = medians([fast, slow, fast])
    assert values["tokens_per_s"] == fast.tokens_per_s == 2.0
    assert values["tokens_per_s_most"] == slow.tokens_per_s
    assert values["ttft_ms_median"] == pytest.approx(500.0)
    assert (values["rounds"], values["errors"]) == (3, 0)


def printed(table):
    """The table as it looks in a terminal."""
    page = io.StringIO()
    Console(width=140, file=page).print(table)
    return page.getvalue()


def contestant(name):
    return Contestant(name=name, version="1", command=("true",), model="m", ready="/")


def lines_of_two():
    ours = measure([trace()])
    other = measure([trace(ended=6.0), trace(error="late", ended=6.0)])
    measures = {1: [[ours, ours], [other, other]], 4: [[ours], [other]], 16: [[], []]}
    return all_lines(measures, [contestant("ours"), contestant("other")], COMMON, output_tokens=3)


def test_lines_compare_with_the_first_server():
    """A line a concurrency and server, none where no round was run yet."""
    lines = lines_of_two()
    assert [(line.concurrency, line.server, line.rounds) for line in lines] == [
        (1, "ours", 2),
        (1, "other", 2),
        (4, "ours", 1),
        (4, "other", 1),
    ]
    assert [line.ratio_to_first for line in lines[:2]] == [1.0, pytest.approx(4.0)]
    assert [line.errors for line in lines[:2]] == [0, 2]


def test_the_csv_and_the_table_hold_the_lines(tmp_path):
    """Four digits, nothing for what is not there, and who failed is seen."""
    lines = lines_of_two()
    file = tmp_path / "new" / "serving.csv"
    write_rows(file, [*lines, dataclasses.replace(lines[0], ttft_ms_median=None, tokens_per_s=1234.5678)])
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[1]["server"] == "other"
    assert float(rows[1]["ratio_to_first"]) == 4.0
    assert (rows[-1]["ttft_ms_median"], rows[-1]["tokens_per_s"]) == ("", "1235")
    shown = printed(load_table(lines))
    assert "4.00x" in shown
    assert "500 (500)" in shown


def test_prefix_lines_are_medians_of_pairs(tmp_path):
    """The ratio is each prompt's own; a server without answers has no line."""
    pairs = {
        "ours": [Pair(miss_ms=100.0, hit_ms=10.0), Pair(miss_ms=200.0, hit_ms=40.0), Pair(miss_ms=400.0, hit_ms=20.0)],
        "b": [],
    }
    (line,) = prefix_lines(pairs, {"ours": "1", "b": "2"}, COMMON, 2000)
    assert (line.miss_ms, line.hit_ms, line.hit_over_miss, line.prompts) == (200, 20, 0.1, 3)
    assert "10 %" in printed(prefix_table([line]))


def test_rivals_that_are_not_there_are_left_out_with_a_sentence(tmp_path, capsys):
    """One line each, and no failure."""
    plan = ServingPlan(threads=1, sequences=2, tokens=100)
    assert list(rivals(tmp_path, "nowhere", [], tmp_path, plan)) == []
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == ["llama.cpp", "vllm", "transformers"]


def test_the_rivals_copy_of_a_model_never_ends(tiny_llama, tmp_path):
    """No end-of-sequence token in either file; weights are not copied."""
    folder = endless_folder(str(tiny_llama), tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] is None
    assert (folder / "model.safetensors").resolve() == (tiny_llama / "model.safetensors").resolve()
    assert json.loads((tiny_llama / "config.json").read_text())["eos_token_id"] == 256


class ScriptedServer:
    """Answers completions over a real socket: so many tokens a stream, a pause before each; knows how many were open.

    Attributes:
        tokens: it writes, whatever is asked for.
        bodies: what was asked.
        most_open: most requests at the same time.
    """

    def __init__(self, tokens, pause=0.02, status=200):
        self.tokens, self.pause, self.status = tokens, pause, status
        self.bodies, self.connections = [], []
        self.open = self.most_open = 0

    async def answer(self, reader, writer):
        """Serve one connection until it is closed."""
        self.connections.append(asyncio.current_task())
        while head := await self._head(reader):
            length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"content-length" in line.lower())
            self.bodies.append(json.loads(await reader.readexactly(length)))
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            writer.write(f"HTTP/1.1 {self.status} Said\r\ntransfer-encoding: chunked\r\n\r\n".encode())
            for number in range(self.tokens):
                await asyncio.sleep(self.pause)
                self.send(writer, {"choices": [{"text": f" w{number}"}]})
            usage = {"prompt_tokens": 5, "completion_tokens": self.tokens}
            self.send(writer, {"choices": [], "usage": usage})
            self.open -= 1
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _head(self, reader):
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""

    def send(self, writer, event):
        """Send an event as two chunks, for borders lie anywhere."""
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        for part in (data[:9], data[9:]):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))


def loaded(server, prompts, output_tokens, concurrency):
    """Run the client against a scripted server."""

    async def run():
        listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        target = Target(url=f"http://127.0.0.1:{port}/v1/completions", model="m", extra={"ignore_eos": True})
        async with listening:
            traces = await run_load(target, prompts, output_tokens=output_tokens, concurrency=concurrency)
            await asyncio.gather(*server.connections)
        return traces

    return asyncio.run(run())


def test_the_client_keeps_so_many_in_flight_and_times_every_token():
    """Every prompt once, all tokens counted, first token after one pause, gaps of a pause."""
    server = ScriptedServer(tokens=4)
    traces = loaded(server, [f"prompt {number}" for number in range(9)], output_tokens=4, concurrency=3)
    assert [one.error for one in traces] == [""] * 9
    assert server.most_open == 3
    assert sorted(body["prompt"] for body in server.bodies) == [f"prompt {number}" for number in range(9)]
    assert all(body["ignore_eos"] and body["stream"] and body["max_tokens"] == 4 for body in server.bodies)
    for one in traces:
        assert (one.output_tokens, one.prompt_tokens, len(one.arrivals)) == (4, 5, 4)
        assert one.first_token_seconds >= server.pause
        assert min(one.gaps) > 0
        assert sum(one.gaps) >= 2 * server.pause
        assert one.ended >= one.arrivals[-1]


def test_an_answer_that_is_too_short_or_refused_is_an_error():
    """So that nobody wins by stopping early; the server's own words are kept."""
    (short,) = loaded(ScriptedServer(tokens=2), ["p"], output_tokens=4, concurrency=1)
    assert short.error == "2 tokens in 2 pieces instead of 4 tokens"
    (refused,) = loaded(ScriptedServer(tokens=1, status=429), ["p"], output_tokens=1, concurrency=1)
    assert refused.error.startswith("status 429: data:")


def test_nobody_listening_is_an_error_and_not_a_crash():
    """The name of the failure is kept."""
    target = Target(url="http://127.0.0.1:1/v1/completions", model="m")
    (one,) = asyncio.run(run_load(target, ["p"], output_tokens=1, concurrency=1))
    assert one.error.startswith("ConnectError")

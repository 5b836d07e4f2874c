"""How fast the engine's own steps are on a model of real shapes: one token for each of B sequences, bits against fp16.

    python -m benchmarks.engine_steps --device cuda                      # random weights in the shape of Llama-3 8B
    python -m benchmarks.engine_steps --shape tiny --batch 1 4           # to try the script

Two models of the same shape with random weights, one dense and one with a sign a weight in all blocks, each behind the
engine's runner, on a GPU with recorded steps and without. They take turns; medians count, and ratios are to the faster
way of the dense one. Nothing is drawn and nobody is served: what is timed is what the engine waits for in every step.
Sequences have `--context` tokens in the cache already.

`share_of_bandwidth` says how near a step is to what its bytes allow: weights and the keys and values that it reads,
over the device's measured bandwidth, over its time.
"""

import argparse
import statistics
import sys
import time
from array import array
from collections.abc import Sequence as ListOf
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.kernel_bench.device import device_name, measure_peaks
from benchmarks.kernel_bench.results import output_file, shown_command, write_table
from onebit_core.kernels import resolve_backend, resolve_device
from onebit_core.layers import SignLinear, pack_layers, packed_bytes, use_backend
from onebit_core.model.blocks import layout_of, shared_inputs
from onebit_core.model.replace import replace_module
from service.engine.runner import Runner
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.types import EngineConfig, GenerationRequest, SamplingParams

SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
PAGE_SIZE = 16
FIRST_PAGE = 1


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """One way to compute one number of rows."""

    device: str
    date: str
    command: str
    model: str
    weights: str
    graphs: bool
    dtype: str
    batch: int
    context: int
    step_ms: float
    tokens_per_second: float
    times_dense: float
    read_bytes: int
    bytes_per_second: float
    share_of_bandwidth: float


def main() -> int:
    """Measure and write a CSV."""
    options = arguments()
    device = resolve_device(options.device)
    dtype = torch.float16 if device != "cpu" else torch.float32
    made = models(options.shape, device, dtype)
    runners = {weights: Runner(model, engine_config(options)) for weights, model in made.items()}
    bandwidth = measure_peaks(device).bytes_per_second
    lines = [
        line for batch in options.batch for line in measure(runners, batch, options, device=device, bandwidth=bandwidth)
    ]
    for line in lines:
        print(
            f"{line.weights:6} {'graphs' if line.graphs else 'plain':6} {line.batch:4} rows  {line.step_ms:8.3f} ms  "
            f"{line.times_dense:5.2f}x dense  {line.share_of_bandwidth:4.0%} of the bandwidth"
        )
    out = output_file(options.out, "engine_steps", lines[0].device, lines[0].date[:10])
    write_table(out, [asdict(line) for line in lines])
    print(out)
    return 0


def models(shape: str, device: str, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Return the dense model and that of signs, random, on the device."""
    made = {}
    for weights in ("dense", "signs"):
        # Each its own: the runner changes it.
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
        model.requires_grad_(requires_grad=False)
        made[weights] = model
    turn_into_signs(made["signs"], device)
    return made


def turn_into_signs(model: PreTrainedModel, device: str) -> None:
    """Put a layer of signs with the scales of rows and columns in the place of every linear of the blocks."""
    groups = layout_of("LlamaForCausalLM").groups
    for block in model.model.layers:
        for name in (name for group in groups for name in group):
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            size = linear.weight.abs().mean().float()
            layer = SignLinear.from_parts(
                linear.weight[None],
                scale_in_PI=torch.ones(1, linear.in_features, device=device),
                scale_out_PO=torch.full((1, linear.out_features), float(size), device=device),
            )
            replace_module(block, name, layer)
    use_backend(model, resolve_backend("auto", device))
    pack_layers(model, shared_inputs(model))


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """Return a configuration whose cache holds the largest batch."""
    return EngineConfig(
        artifact="",
        page_size=PAGE_SIZE,
        kv_cache_bytes=options.kv_cache_bytes,
        max_num_sequences=max(options.batch),
        max_model_len=options.context + options.steps + PAGE_SIZE,
    )


def sequences(batch: int, context: int, steps: int) -> list[Sequence]:
    """Return sequences whose prompt is computed, as far as the runner can tell."""
    made = []
    width = -(-(context + steps + 1) // PAGE_SIZE)
    for row in range(batch):
        tokens = [5 + (row + place) % 400 for place in range(context + 1)]
        request = GenerationRequest(
            request_id=str(row), prompt_token_ids=tuple(tokens), sampling=SamplingParams(max_tokens=steps)
        )
        sequence = Sequence(request=request, seed=0, tokens=tokens, num_computed=context)
        first = FIRST_PAGE + row * width
        sequence.page_table = array("q", range(first, first + width))
        made.append(sequence)
    return made


@torch.inference_mode()
def step_seconds(runner: Runner, batch: int, context: int, steps: int, *, graphs: bool) -> float:
    """Return how long a step takes on average, the tensors of the step included."""
    compute = runner.forward if graphs else partial(runner._forward, fused=runner._fused)
    rows = sequences(batch, context, steps)
    start = 0.0
    for step in range(steps + 1):
        if step == 1:  # the first brings everything into the caches
            start = time.perf_counter()
        chunks = [Chunk(sequence=row, start=row.num_computed, length=1, draws=True) for row in rows]
        tokens = compute(runner.prepare(chunks)).argmax(-1).tolist()  # waits for the device
        for row, token in zip(rows, tokens, strict=True):
            row.num_computed += 1
            row.tokens.append(token)
    return (time.perf_counter() - start) / steps


def measure(
    runners: dict[str, Runner], batch: int, options: argparse.Namespace, *, device: str, bandwidth: float
) -> list[StepLine]:
    """Time every runner in turn."""
    ways = [(weights, graphs) for weights in runners for graphs in ((True, False) if device != "cpu" else (False,))]
    seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for weights, graphs in ways:
            took = step_seconds(runners[weights], batch, options.context, options.steps, graphs=graphs)
            seconds[weights, graphs].append(took)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    dense = min(step for (weights, _), step in medians.items() if weights == "dense")
    lines = []
    for (weights, graphs), step in medians.items():
        runner = runners[weights]
        read = read_bytes(runner, batch, options.context + options.steps // 2)
        lines.append(
            StepLine(
                device=device_name(device),
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                command=shown_command("benchmarks.engine_steps", sys.argv[1:]),
                model=f"random, shape {options.shape}",
                weights=weights,
                graphs=graphs,
                dtype=str(runner.dtype).removeprefix("torch."),
                batch=batch,
                context=options.context,
                step_ms=round(1e3 * step, 4),
                tokens_per_second=round(batch / step, 1),
                times_dense=round(dense / step, 3),
                read_bytes=read,
                bytes_per_second=round(bandwidth),
                share_of_bandwidth=round(read / bandwidth / step, 4),
            )
        )
    return lines


def read_bytes(runner: Runner, batch: int, keys: int) -> int:
    """Return the bytes a step must read: all weights but the embedding, and the keys and values of its rows."""
    model = runner._model
    embedding = model.get_input_embeddings().weight
    dense = sum(parameter.nbytes for parameter in model.parameters()) - embedding.nbytes
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * batch * keys * config.num_hidden_layers * config.num_key_value_heads * head * embedding.itemsize
    return int(dense + packed_bytes(model) + cache)


def arguments(given: ListOf[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence in the cache")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every model; the median counts")
    parser.add_argument("--kv-cache-bytes", type=int, default=6 << 30, help="of each model")
    parser.add_argument("--out", type=Path, help="CSV file, or the folder of engine_steps_<device>_<date>.csv")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())

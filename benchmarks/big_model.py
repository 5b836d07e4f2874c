"""Does a model that fits nowhere as a whole quantize in the memory that the plan says?

    python -m benchmarks.big_model --shape llama-3-70b --blocks 1 --vocab 8192 --method rtn --samples 1 --tokens 256

writes a random model of real shapes, block by block (bfloat16, one file a block, so that writing takes little memory
too), quantizes it in a process of its own, and compares the most memory that process ever had, less what it had before
it began, with `MemoryPlan.host_bytes`; on a GPU also what was allocated there with `device_bytes`. Two numbers of main
memory are kept: all resident pages, and those that are not a file's, which the operating system cannot take back.

The weights are noise, so nothing is said about accuracy; time is that of a machine that may have other work.
"""

import argparse
import csv
import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from benchmarks.kernel_bench.device import device_name
from onebit_core.errors import OnebitError
from onebit_core.kernels import resolve_device
from onebit_core.model.weights import INDEX_FILE

RESULTS = Path(__file__).parent / "results"
WEIGHT_SPREAD = 0.02
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocab: int


SHAPES = {
    "llama-3-70b": Shape(hidden=8192, intermediate=28672, heads=64, kv_heads=8, blocks=80, vocab=128256),
    "llama-3-8b": Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, blocks=32, vocab=128256),
    "llama-3.2-1b": Shape(hidden=2048, intermediate=8192, heads=32, kv_heads=8, blocks=16, vocab=128256),
    "small": Shape(hidden=1024, intermediate=3584, heads=16, kv_heads=4, blocks=2, vocab=2048),
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One quantization: what was planned, what was measured, in bytes.

    Attributes:
        plan: the items of the MemoryPlan.
        planned_host: the most in main memory, by the plan.
        planned_device: the most on the GPU, by the plan.
        baseline: resident before the quantization began.
        peak_resident: the most resident memory above the baseline.
        peak_anonymous: the same without pages of files.
        peak_device: the most that was allocated on the GPU.
        bits: true bits a weight of the linears.
        seconds: of the quantization.
    """

    plan: dict[str, int]
    planned_host: int
    planned_device: int
    baseline: int
    peak_resident: int
    peak_anonymous: int
    peak_device: int
    bits: float
    seconds: float


def main() -> int:
    """Run what the arguments ask for."""
    options = _arguments()
    if options.child:
        _quantize(json.loads(options.child))
        return 0
    shape = dataclasses.replace(SHAPES[options.shape], blocks=options.blocks)
    shape = dataclasses.replace(shape, vocab=options.vocab or shape.vocab)
    options.work.mkdir(parents=True, exist_ok=True)
    config = _config_of(options)
    try:
        write_model(options.work / "model", shape, options.seed)
        measurement = measure({**config, "model": str(options.work / "model")}, options.work / "artifact")
    except (OnebitError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        for folder in ("model", "artifact"):
            shutil.rmtree(options.work / folder, ignore_errors=True)
    line = _line(options, shape, config, measurement)
    _append(options.out or RESULTS / f"big_model_{datetime.now(UTC):%Y-%m-%d}.csv", line)
    print(json.dumps(line, indent=1))
    return 0


def write_model(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a random Llama as a sharded folder, one block in memory at a time.

    Args:
        folder: made; must not exist.
        shape: its sizes.
        seed: equal ones give equal weights.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    head_dim = shape.hidden // shape.heads
    kv = shape.kv_heads * head_dim
    matrices = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    files: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    for index in range(shape.blocks):
        prefix = f"model.layers.{index}."
        tensors = {f"{prefix}{name}.weight": _noise(size, generator) for name, size in matrices.items()}
        norms = {f"{prefix}{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")}
        save(f"block-{index:05d}.safetensors", tensors | {name: norm.clone() for name, norm in norms.items()})
    save("embedding.safetensors", {"model.embed_tokens.weight": _noise((shape.vocab, shape.hidden), generator)})
    head = {"lm_head.weight": _noise((shape.vocab, shape.hidden), generator), "model.norm.weight": ones}
    save("head.safetensors", head)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    _write_config(folder, shape)
    return folder


def _noise(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return normal numbers, drawn a few rows at a time."""
    result = torch.empty(size, dtype=torch.bfloat16)
    for part in result.split(max(1, (1 << 24) // size[-1])):
        part.copy_(torch.randn(part.shape, generator=generator) * WEIGHT_SPREAD)
    return result


def _write_config(folder: Path, shape: Shape) -> None:
    """Write config.json and a tokenizer whose ids are bytes."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.blocks,
        vocab_size=shape.vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def measure(config: Mapping[str, Any], out: Path, environment: Mapping[str, str] | None = None) -> Measurement:
    """Quantize in a process of its own and watch its memory.

    Args:
        config: values of a QuantizeConfig.
        out: the artifact's folder.
        environment: of the process; None for this one's.

    Raises:
        CalledProcessError: the quantization failed; its own message went to standard error.
    """
    task = json.dumps({"config": config, "out": str(out)})
    command = [sys.executable, "-m", "benchmarks.big_model", "--child", task]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=Path(__file__).parents[1]
    )
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def _quantize(task: Mapping[str, Any]) -> None:
    """Be that process: print a Measurement as JSON."""
    from onebit_core.artifact.identity import read_manifest
    from onebit_core.model.loading import open_original
    from onebit_core.pipeline.config import QuantizeConfig
    from onebit_core.pipeline.plan import make_plan
    from onebit_core.pipeline.run import quantize_model

    config, out = QuantizeConfig.from_dict(task["config"]), Path(task["out"])
    plan = make_plan(open_original(config.model), config).memory
    before = memory_of_process()
    started = time.monotonic()
    with most_anonymous() as most:
        quantize_model(config, out)
    measurement = Measurement(
        plan={key: int(value) for key, value in dataclasses.asdict(plan).items()},
        planned_host=plan.host_bytes,
        planned_device=plan.device_bytes,
        baseline=before["VmRSS"],
        peak_resident=memory_of_process()["VmHWM"] - before["VmRSS"],
        peak_anonymous=most[0] - before["RssAnon"],
        peak_device=torch.cuda.max_memory_allocated() if plan.on_device else 0,
        bits=read_manifest(out).bits.linear_true,
        seconds=round(time.monotonic() - started, 1),
    )
    print(json.dumps(dataclasses.asdict(measurement)))


def memory_of_process() -> dict[str, int]:
    """Return bytes by kind, as Linux counts them for this process (VmHWM: the most that was ever resident)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines if line.endswith("kB"))
    return {key: 1024 * int(value.split()[0]) for key, value in values.items()}


@contextmanager
def most_anonymous() -> Iterator[list[int]]:
    """Look again and again at the memory that no file is behind; the list's one number is the most so far."""
    most = [memory_of_process()["RssAnon"]]
    done = threading.Event()

    def look() -> None:
        while not done.wait(SECONDS_BETWEEN_LOOKS):
            most[0] = max(most[0], memory_of_process()["RssAnon"])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _config_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the QuantizeConfig, but for the model."""
    from onebit_core.cli.quantize import parse_settings

    return {
        "method": options.method,
        "settings": parse_settings(options.set),
        "calibration": {"samples": options.samples, "tokens": options.tokens},
        "reconstruction": {"preset": options.reconstruct},
        "embedding_bits": options.embedding_bits,
        "activations": options.activations,
        "device": options.device,
    }


def _line(
    options: argparse.Namespace, shape: Shape, config: Mapping[str, Any], measurement: Measurement
) -> dict[str, Any]:
    """Return one line of the CSV."""
    return {
        "shape": options.shape,
        "hidden": shape.hidden,
        "intermediate": shape.intermediate,
        "blocks": shape.blocks,
        "vocab": shape.vocab,
        "method": options.method,
        "settings": json.dumps(config["settings"], sort_keys=True),
        "reconstruction": options.reconstruct,
        "samples": options.samples,
        "tokens": options.tokens,
        "activations": options.activations,
        "embedding_bits": options.embedding_bits,
        "planned_bytes": measurement.planned_host,
        "peak_resident_bytes": measurement.peak_resident,
        "peak_anonymous_bytes": measurement.peak_anonymous,
        "planned_device_bytes": measurement.planned_device,
        "peak_device_bytes": measurement.peak_device,
        "baseline_bytes": measurement.baseline,
        "plan": json.dumps(measurement.plan),
        "true_bits_linear": measurement.bits,
        "seconds": measurement.seconds,
        "device": device_name(resolve_device(options.device)),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.big_model", *_without_folders(sys.argv[1:])]),
        "versions": json.dumps({"torch": torch.__version__, "python": sys.version.split()[0]}),
    }


def _without_folders(arguments: Sequence[str]) -> list[str]:
    """Drop the options that name this machine's folders."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--work", "--out"):
            kept.append(argument)
        skip = argument in ("--work", "--out")
    return kept


def _append(out: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a CSV."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    with out.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(line), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(line)


def _arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-70b")
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=None, help="rows of embedding and head; default: the shape's")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of the method")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--reconstruct", choices=("off", "light", "full"), default="off")
    parser.add_argument("--embedding-bits", type=int, choices=(4, 8, 16), default=16)
    parser.add_argument("--activations", choices=("auto", "memory", "disk"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/big_model"), help="needs the model's size on disk")
    parser.add_argument("--out", type=Path, default=None, help="CSV file to add a line to")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

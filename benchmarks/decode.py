"""How fast a quantized model writes, by backend: tokens a second of greedy decoding with a KV cache.

    python -m benchmarks.decode                       # the sample model in one bit, made first
    python -m benchmarks.decode ARTIFACT --batch 1 16

Every backend loads the same artifact and continues the same prompts with transformers' own code. The backends take
turns, so that a busy machine hits all of them; the first tokens (the prompt) are not counted. What is written is forced
to be as long as asked for, and is nonsense for the one-bit sample: only the time is looked at. A backend whose logits
on the prompt differ from the reference's is not timed.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.kernel_bench.device import device_name
from benchmarks.kernel_bench.results import output_file, shown_command, write_table
from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.errors import BackendUnavailable, OnebitError
from onebit_core.kernels import resolve_device
from onebit_core.kernels.backends import describe_backend
from onebit_core.model.sample import sample_model_path

TOLERANCE = {"float32": 0.02, "bfloat16": 0.1, "float16": 0.05}
"""Largest difference of logits over the largest logit, by the dtype of activations."""

PROMPT = (
    "The library was built in the year of the great flood, and for a century nobody had counted its books. When the "
    "council finally sent two clerks with a ladder and a lamp, they found that every shelf carried a number."
)


@dataclass(frozen=True, kw_only=True)
class DecodeLine:
    """One backend at one batch size."""

    device: str
    date: str
    command: str
    threads: int
    model: str
    method: str
    whole_model_bits: float
    backend: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    ratio_to_reference: float | None
    versions: str


def main() -> int:
    """Make the artifact if there is none, measure, write, print."""
    options = arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = resolve_device(options.device)
        artifact = options.artifact or make_artifact(options.work)
        lines = run(artifact, options, device)
    except OnebitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not lines:
        return 1
    write(output_file(options.out, "decode", lines[0].device, lines[0].date), lines)
    return 0


def make_artifact(work: Path) -> Path:
    """Quantize the sample model to one sign a weight, once; how well it speaks does not matter here."""
    out = work / "sample-svid"
    if not out.exists():
        words = ["quantize", str(sample_model_path()), "--method", "svid", "--embedding-bits", "8"]
        words += ["--samples", "2", "--tokens", "128", "--progress", "none", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "onebit_core.cli.main", *words], check=True)
    return out


def run(artifact: Path, options: argparse.Namespace, device: str) -> list[DecodeLine]:
    """Load every backend, check its logits, let them take turns at every batch size."""
    loaded = {}
    for backend in options.backends:
        try:
            loaded[backend] = load_model(artifact, device=device, dtype=options.dtype, backend=backend)
        except BackendUnavailable as error:
            print(f"left out: {error}", file=sys.stderr)
    if not loaded:
        return []
    tokenizer = next(iter(loaded.values())).tokenizer
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"], device=device)
    models = agreeing({name: one.model for name, one in loaded.items()}, ids)
    manifest = read_manifest(artifact)
    lines = []
    for batch in options.batch:
        prompts = prompts_of(ids, batch, options.prompt_tokens)
        rates = measure(models, prompts, options.new_tokens, options.rounds)
        for backend, rate in rates.items():
            ratio = rate / rates["reference"] if "reference" in rates else None
            lines.append(
                DecodeLine(
                    device=device_name(device),
                    date=f"{datetime.now(UTC):%Y-%m-%d}",
                    command=shown_command("benchmarks.decode", sys.argv[1:]),
                    threads=torch.get_num_threads() if device == "cpu" else 0,
                    model=manifest.name,
                    method=manifest.method,
                    whole_model_bits=round(manifest.bits.whole_model, 3),
                    backend=describe_backend(backend),
                    dtype=str(models[backend].dtype).removeprefix("torch."),
                    batch=batch,
                    prompt_tokens=prompts.shape[1],
                    new_tokens=options.new_tokens,
                    tokens_per_s=float(f"{rate:.4g}"),
                    ratio_to_reference=None if ratio is None else float(f"{ratio:.4g}"),
                    versions=f"torch {torch.__version__}",
                )
            )
            shown = "" if ratio is None else f", {ratio:.3g}x the reference"
            print(f"batch {batch:3}  {describe_backend(backend)}: {rate:.4g} tokens/s{shown}", flush=True)
    return lines


def prompts_of(ids: Tensor, batch: int, length: int) -> Tensor:
    """Return a different window of the text for every row: int64 [batch, length]."""
    length = min(length, ids.shape[0] - 1)
    starts = [row % (ids.shape[0] - length) for row in range(batch)]
    return torch.stack([ids[start : start + length] for start in starts])


def agreeing(models: Mapping[str, PreTrainedModel], ids: Tensor) -> dict[str, PreTrainedModel]:
    """Return the models whose logits on the prompt are the reference's; a wrong kernel is not fast."""
    if "reference" not in models:
        return dict(models)
    with torch.inference_mode():
        truth = models["reference"](ids[None]).logits.float()
        kept = {}
        for name, model in models.items():
            error = float((model(ids[None]).logits.float() - truth).abs().max() / truth.abs().max())
            if error <= TOLERANCE[str(model.dtype).removeprefix("torch.")]:
                kept[name] = model
            else:
                print(f"left out: {name}: WRONG: its logits are off by {error:.2g} of the largest", file=sys.stderr)
    return kept


def measure(models: Mapping[str, PreTrainedModel], prompts: Tensor, new_tokens: int, rounds: int) -> dict[str, float]:
    """Return the median tokens a second of each, all rows of the batch together; the slow reference does fewer."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        decode_seconds(model, prompts, 2)  # packs, compiles, allocates
    for _ in range(rounds):
        for name, model in models.items():
            steps = max(1, new_tokens // 4) if name == "reference" else new_tokens
            seconds[name].append(decode_seconds(model, prompts, steps) / steps)
    return {name: prompts.shape[0] / statistics.median(times) for name, times in seconds.items()}


def decode_seconds(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> float:
    """Return how long so many steps took after the prompt."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = model(prompts, past_key_values=cache, use_cache=True).logits
        next_ids = logits[:, -1:].argmax(-1)
        _wait(model)
        start = time.perf_counter()
        for _ in range(new_tokens):
            logits = model(next_ids, past_key_values=cache, use_cache=True).logits
            next_ids = logits[:, -1:].argmax(-1)
        _wait(model)
        return time.perf_counter() - start


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def write(out: Path, lines: Sequence[DecodeLine]) -> None:
    """Write the CSV."""
    write_table(out, [asdict(line) for line in lines])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", nargs="?", type=Path, help="default: the sample model by svid, made under --work")
    parser.add_argument("--work", type=Path, default=Path("build/decode"), help="where it is made")
    parser.add_argument("--backends", nargs="+", default=None, help="default: reference, dense and the packed one")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every backend; the median counts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=("auto", *TOLERANCE), help="of activations")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's")
    parser.add_argument("--out", type=Path, help="CSV file, or the folder of decode_<device>_<date>.csv")
    options = parser.parse_args()
    if options.backends is None:
        on_gpu = options.device.startswith("cuda") or (options.device == "auto" and torch.cuda.is_available())
        options.backends = ["reference", "dense", "triton" if on_gpu else "cpu"]
    return options


if __name__ == "__main__":
    sys.exit(main())

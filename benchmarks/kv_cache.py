"""What a KV cache in 8 bit costs in accuracy: KL divergence from the same model with whole keys and values.

    python -m benchmarks.kv_cache --text wikitext2=wiki.test.raw
    python -m benchmarks.kv_cache --text news=news.txt --model FOLDER --windows 16 --tokens 1024

Nothing but keys and values differs: the original model runs in float32, and its attention sees them as a cache would
give them back. `int8` is the engine's own cache; the others are what it was chosen from: other ways to round, and
ways that keep the newest tokens whole, as WKVQuant (arXiv:2402.12065) proposes. There a query sees the tokens of its
own run of N positions as they are, and those before it from the cache.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from benchmarks.kernel_bench.device import device_name
from benchmarks.kernel_bench.results import output_file, shown_command, write_table
from onebit_core.errors import OnebitError
from onebit_core.evaluation.divergence import summarize_divergence, token_agreement, token_divergence
from onebit_core.evaluation.windows import TokenWindows, read_windows
from onebit_core.layers.rotated import rotate, rotate_back
from onebit_core.model.loading import load_original
from onebit_core.model.sample import sample_model_path
from service.engine.kv_cache import Int8KVCache

ATTENTION = "onebit_kv_cache_benchmark"
PAGE = 16
LEVELS = 255

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to keep keys and values.

    Attributes:
        keys: what comes back of keys [K, T, D].
        values: what comes back of values.
        bits: of one number, scales included, with heads of 64.
        whole: newest tokens that a query sees as they are; 0 for none.
    """

    keys: Rows
    values: Rows
    bits: float
    whole: int = 0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One way on one text."""

    device: str
    date: str
    command: str
    model: str
    text: str
    fingerprint: str
    windows: int
    window_tokens: int
    way: str
    bits: float
    newest_whole: int
    kl_mean: float
    kl_se: float
    kl_p99: float
    kl_max: float
    top1: float
    versions: str


def as_the_engine(rows_KTD: Tensor) -> Tensor:
    """Return what the engine's own cache gives back, in the model's basis."""
    num_heads, num_tokens, head_dim = rows_KTD.shape
    cache = Int8KVCache(
        num_layers=1,
        num_pages=num_tokens,
        page_size=1,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        dtype=rows_KTD.dtype,
        device=rows_KTD.device,
    )
    slots_T = torch.arange(1, num_tokens + 1)
    rows_THD = rows_KTD.transpose(0, 1)
    cache.write(0, slots_T, rows_THD, rows_THD)
    return cache.restore(cache.read(0, slots_T)[0].flatten(0, 1)).transpose(0, 1)


def symmetric(rows: Tensor) -> Tensor:
    """Round every token's row to 255 levels around zero."""
    scale = (rows.abs().amax(-1, keepdim=True) / (LEVELS // 2)).clamp_min(1e-12)
    return (rows / scale).round() * scale


def asymmetric(rows: Tensor, dim: int = -1) -> Tensor:
    """Round every token's row (or every column of `dim`) to 256 levels between its least and largest number."""
    least, largest = rows.amin(dim, keepdim=True), rows.amax(dim, keepdim=True)
    scale = ((largest - least) / LEVELS).clamp_min(1e-12)
    return ((rows - least) / scale).round() * scale + least


def by_channel(rows_KTD: Tensor) -> Tensor:
    """Round every channel of a page of tokens by itself, as KIVI does with keys (arXiv:2402.02750)."""
    return asymmetric(rows_KTD.unflatten(1, (-1, PAGE)), dim=2).flatten(1, 2)


def rotated(way: Rows) -> Rows:
    """Round behind a rotation."""
    return lambda rows: rotate_back(way(rotate(rows)))


def same(way: Rows, bits: float, whole: int = 0) -> Way:
    """Keep keys and values alike."""
    return Way(keys=way, values=way, bits=bits, whole=whole)


WAYS: dict[str, Way] = {
    "int8 (the engine's)": same(as_the_engine, 8.5),
    "int8, newest page whole": same(as_the_engine, 8.5, PAGE),
    "int8, newest 128 whole": same(as_the_engine, 8.5, 128),
    "int8 with zero point": same(rotated(asymmetric), 9),
    "int8, no rotation": same(symmetric, 8.5),
    "int8, no rotation, newest page whole": same(symmetric, 8.5, PAGE),
    "int8, no rotation, newest 128 whole": same(symmetric, 8.5, 128),
    "int8 with zero point, no rotation": same(asymmetric, 9),
    "int8 keys by channel, newest page whole": Way(keys=by_channel, values=asymmetric, bits=10.5, whole=PAGE),
}


class Attention:
    """Stands in the model's attention and keeps keys and values in one of the ways."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.way: Way | None = None
        AttentionInterface.register(ATTENTION, self)
        model.set_attn_implementation(ATTENTION)

    def __call__(
        self,
        _module: nn.Module,
        query_1HTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        _mask: Tensor | None,
        *,
        scaling: float,
        **_unused: object,
    ) -> tuple[Tensor, None]:
        """Attend causally, each query over the keys as its cache would give them."""
        query_KGTD = query_1HTD[0].unflatten(0, (key_1KTD.shape[1], -1))
        keys_KSD, values_KSD = key_1KTD[0], value_1KTD[0]
        way = self.way or same(lambda rows: rows, 32)
        place_T = torch.arange(keys_KSD.shape[1])
        is_later_TS = place_T > place_T[:, None]
        is_whole_TS = (place_T // max(way.whole, 1) == place_T[:, None] // max(way.whole, 1)) & (way.whole > 0)
        kept_KGTS = query_KGTD @ way.keys(keys_KSD).transpose(-1, -2)[:, None]
        whole_KGTS = query_KGTD @ keys_KSD.transpose(-1, -2)[:, None]
        scores_KGTS = torch.where(is_whole_TS, whole_KGTS, kept_KGTS) * scaling
        weights_KGTS = scores_KGTS.masked_fill(is_later_TS, float("-inf")).softmax(-1)
        output_KGTD = (weights_KGTS * is_whole_TS) @ values_KSD[:, None]
        output_KGTD += (weights_KGTS * ~is_whole_TS) @ way.values(values_KSD)[:, None]
        return output_KGTD.flatten(0, 1).transpose(0, 1)[None], None


def measure(model: PreTrainedModel, texts: TokenWindows) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield, of each way, its name, and KL and agreement of every predicted token, [W, T]."""
    attention = Attention(model)
    divergence: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    agreement: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    for window_T in texts.tokens_WT:
        attention.way = None
        truth_TV = log_probabilities(model, window_T)
        for name, attention.way in WAYS.items():
            kept_TV = log_probabilities(model, window_T)
            divergence[name].append(token_divergence(truth_TV, kept_TV))
            agreement[name].append(token_agreement(truth_TV, kept_TV))
    for name in WAYS:
        yield name, torch.stack(divergence[name]), torch.stack(agreement[name])


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, window_T: Tensor) -> Tensor:
    """Return what the model predicts after every token but the last, float32 [T - 1, V]."""
    logits_TV: Tensor = model(window_T[None], use_cache=False).logits[0, :-1]
    return logits_TV.float().log_softmax(-1)


def main() -> int:
    """Measure, write, print."""
    options = arguments()
    try:
        source = options.model or str(sample_model_path())
        model, tokenizer = load_original(source, dtype=torch.float32)
        name, _, file = options.text.partition("=")
        texts = read_windows(name, file, tokenizer, window_tokens=options.tokens, windows=options.windows)
    except OnebitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = [f"{name}={Path(file).name}" if word == options.text else word for word in sys.argv[1:]]
    lines = []
    for way, divergence_WT, agreement_WT in measure(model, texts):
        summary = summarize_divergence(divergence_WT)
        lines.append(
            Line(
                device=device_name("cpu"),
                date=f"{datetime.now(UTC):%Y-%m-%d}",
                command=shown_command("benchmarks.kv_cache", words),
                model=Path(source).stem,
                text=name,
                fingerprint=texts.fingerprint,
                windows=options.windows,
                window_tokens=options.tokens,
                way=way,
                bits=WAYS[way].bits,
                newest_whole=WAYS[way].whole,
                kl_mean=float(f"{summary.mean:.4g}"),
                kl_se=float(f"{summary.standard_error:.2g}"),
                kl_p99=float(f"{summary.p99:.4g}"),
                kl_max=float(f"{summary.max:.4g}"),
                top1=float(f"{agreement_WT.float().mean().item():.4g}"),
                versions=f"torch {torch.__version__}",
            )
        )
        print(f"{way:40} KL {summary.mean:.2e} +- {summary.standard_error:.0e}  top-1 {lines[-1].top1:.2%}", flush=True)
    out = output_file(options.out, "kv_cache", lines[0].device, lines[0].date)
    write_table(out, [asdict(line) for line in lines])
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", required=True, metavar="NAME=FILE", help="what is read")
    parser.add_argument("--model", help="folder, hub id or GGUF file; default: the sample model")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="of a window; a multiple of 16")
    parser.add_argument("--out", type=Path, help="CSV file, or the folder of kv_cache_<device>_<date>.csv")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Prints docs/sizing.md: what known models take in memory, by bits, as server and quantizer compute it.

    python -m benchmarks.sizing > docs/sizing.md

    weights   true bits of the method for every linear of the model, as it is stored; embedding and head in 8 bit
    served    at most MOST_PACKED_PER_STORED times that: what the server checks before it loads (registry.memory)
    cache     bytes of one token's keys and values in all layers (engine.kv_cache)

Nothing is loaded: a row of the table below is a model's shapes, read off its published configuration.
"""

from dataclasses import dataclass

import torch

from onebit_core.artifact.manifest import MOST_PACKED_PER_STORED
from onebit_core.layers import EMBEDDINGS, build_layer
from onebit_core.layers.embedding import table_spec
from onebit_core.methods import method_named
from onebit_core.pipeline.allocation import average_bits
from service.engine.kv_cache import KV_CACHES
from service.registry.memory import GPU_PROCESS_BYTES, HOST_PROCESS_BYTES

GIB = float(1 << 30)
CONTEXT_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What of a model's configuration decides its size."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of every linear that a method quantizes."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(query, self.hidden), (key, self.hidden), (key, self.hidden), (self.hidden, query)]
        feed_forward = [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return (attention + feed_forward) * self.layers

    @property
    def parameters(self) -> int:
        """Weights of linears, embedding and head."""
        tables = self.vocabulary * self.hidden * (1 if self.is_tied else 2)
        return sum(rows * columns for rows, columns in self.linears) + tables


# fmt: off
MODELS = (
    Shapes(name="SmolLM2-135M", hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocabulary=49152, is_tied=True),  # noqa: E501
    Shapes(name="Llama-3.2-1B", hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64, vocabulary=128256, is_tied=True),  # noqa: E501
    Shapes(name="Llama-3.2-3B", hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, head_dim=128, vocabulary=128256, is_tied=True),  # noqa: E501
    Shapes(name="Llama-2-7B", hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocabulary=32000, is_tied=False),  # noqa: E501
    Shapes(name="Llama-3.1-8B", hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, is_tied=False),  # noqa: E501
    Shapes(name="Qwen3-14B", hidden=5120, intermediate=17408, layers=40, heads=40, kv_heads=8, head_dim=128, vocabulary=151936, is_tied=False),  # noqa: E501
    Shapes(name="Qwen3-32B", hidden=5120, intermediate=25600, layers=64, heads=64, kv_heads=8, head_dim=128, vocabulary=151936, is_tied=False),  # noqa: E501
    Shapes(name="Llama-3.1-70B", hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, head_dim=128, vocabulary=128256, is_tied=False),  # noqa: E501
)
# fmt: on
CARDS = (16, 24, 48, 80)
METHODS = (("svid", {}), ("lut2", {}), ("gptq", {"bits": 3}), ("gptq", {"bits": 4}))


def stored_bytes(shapes: Shapes, method: str, settings: dict[str, int]) -> int:
    """What an artifact of these shapes holds: linears by the method's true bits, tables in 8 bit."""
    chosen = method_named(method)
    weights = sum(rows * columns for rows, columns in shapes.linears)
    linears = average_bits(chosen, chosen.config.from_dict(settings), shapes.linears) * weights / 8
    with torch.device("meta"):
        table = EMBEDDINGS[8](shapes.vocabulary, shapes.hidden).state_dict().values()
        tables = sum(tensor.nbytes for tensor in table)
        if not shapes.is_tied:
            tables += build_layer(table_spec(shapes.vocabulary, shapes.hidden, 8)).stored_bytes()
    return round(linears) + tables


def cache_bytes(shapes: Shapes, kind: str, dtype: torch.dtype) -> int:
    """Keys and values of one token."""
    return KV_CACHES[kind].page_bytes(
        num_layers=shapes.layers,
        page_size=1,
        num_kv_heads=shapes.kv_heads,
        head_dim=shapes.head_dim,
        dtype=dtype,
    )


def largest_that_fits(gigabytes: int, method: str, settings: dict[str, int]) -> str:
    """The largest model whose weights, loading, a GiB of cache and CUDA are no more than a card of so many GB has."""
    found = "none"
    for shapes in MODELS:
        peak = stored_bytes(shapes, method, settings) * (1 + MOST_PACKED_PER_STORED) + (1 << 30) + GPU_PROCESS_BYTES
        if peak <= gigabytes * 1e9:
            found = shapes.name
    return found


def render() -> str:
    """Return the page."""
    lines = [HEAD.format(ratio=MOST_PACKED_PER_STORED, host=HOST_PROCESS_BYTES / GIB, gpu=GPU_PROCESS_BYTES / GIB)]
    names = [method + "".join(f"-{value}b" for value in settings.values()) for method, settings in METHODS]
    lines += ["## Weights", "", WEIGHTS, ""]
    lines += [_row("model", "weights", "16 bit", *names), _row(*["---"] * (3 + len(names)))]
    for shapes in MODELS:
        cells = []
        for method, settings in METHODS:
            stored = stored_bytes(shapes, method, settings)
            cells.append(f"{_gib(stored)} ({8 * stored / shapes.parameters:.2f})")
        lines.append(_row(shapes.name, _billions(shapes.parameters), _gib(2 * shapes.parameters), *cells))
    lines += ["", "## What fits", "", CARDS_TEXT, "", _row("GPU", *names), _row(*["---"] * (1 + len(names)))]
    for gigabytes in CARDS:
        lines.append(_row(f"{gigabytes} GB", *(largest_that_fits(gigabytes, *method) for method in METHODS)))
    lines += ["", "## KV cache", "", CACHE, ""]
    head = (
        "KiB a token, 16 bit", "KiB a token, int8", f"GiB for {CONTEXT_TOKENS} tokens, 16 bit", "tokens in 1 GiB, int8"
    )  # fmt: skip
    lines += [_row("model", *head), _row(*["---"] * 5)]
    for shapes in MODELS:
        half, int8 = cache_bytes(shapes, "auto", torch.bfloat16), cache_bytes(shapes, "int8", torch.bfloat16)
        cells = [f"{half / 1024:.1f}", f"{int8 / 1024:.1f}", _gib(half * CONTEXT_TOKENS), f"{int(GIB / int8):,}"]
        lines.append(_row(shapes.name, *cells))
    return "\n".join([*lines, "", FOOT])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"


def _billions(number: int) -> str:
    return f"{number / 1e9:.2f} B"


HEAD = """# Sizing

<!-- Printed by `python -m benchmarks.sizing`; edit that file instead. -->

How much memory a server needs, before you have the model. A server takes, on its CPU or its GPU:

```
weights     the artifact, packed; scales in float32 and padding make at most {ratio} times of what is stored
loading     the artifact once more while it loads, given back afterwards
KV cache    kv_cache_bytes, 1 GiB unless set: bytes of a token x tokens in flight
process     {host:.1f} GiB for each engine, on a GPU {gpu:.1f} GiB for CUDA; and 0.5 GiB for the HTTP process
```

Before it loads a model the server computes this sum for the model at hand, says what it is made of, and refuses what
does not fit; `--memory-check off` loads it all the same, which often goes well: the sum is an upper bound.
"""
WEIGHTS = """GiB as stored, embedding and head in 8 bit; in brackets the true bits a weight of the whole model. Small
models are mostly embedding, so their bits stay high; `--embedding-bits 4` takes half of that away. `dense` takes the
column of 16 bit, twice that in float32."""
CARDS_TEXT = """The largest of these models that the server's own sum admits to a GPU with so much memory, with 1 GiB of
KV cache."""
CACHE = (
    """One token's keys and values in all layers, and what follows. float32, the default on a CPU, is twice 16 bit."""
)
FOOT = """## From this to flags

* `--kv-cache-bytes`: KiB a token x (prompt + completion) x sequences at once. 64 sequences of 2,048 tokens of an 8 B
  model are 16 GiB in 16 bit, half in `--kv-cache-dtype int8`. Prompts that begin alike share their pages.
* A container's memory limit: the sum above. A swap of a model needs both at once.
* A job needs one decoder block in float32, its Hessians and calibration samples: `onebit quantize MODEL --plan` prints
  it.
* CPU: tokens a second are bounded by memory bandwidth over the bytes of the weights; the README's tables say what two
  cores do.
"""


if __name__ == "__main__":
    print(render(), end="")

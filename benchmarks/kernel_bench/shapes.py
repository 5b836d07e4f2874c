"""What is multiplied: the linear layers of models from 0.1B to 70B, and which of them a preset measures.

A case is one product: N output features, K input features, M tokens, a storage format, and where the weights lie before
the call. `hot` repeats one copy, so a weight that fits stays in the cache; `cold` walks through so many copies that
every call reads its weight from memory, as a model that is larger than the cache does.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cache = Literal["hot", "cold"]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""M of the full run."""

FORMATS = (
    "sign",  # one plane with row and column scales: OneBit, svid
    "sign-1",  # one plane with row scales
    "sign-2",  # two planes with row scales: residual binarization
    "codes-2",  # integer grids in groups of 128: rtn, gptq
    "codes-3",
    "codes-4",
    "sparse-10",  # one plane, and 10 % of the weights in 8 bit at free places: PB-LLM
    "sparse-20",
    "levels-4",  # four free levels per group of 128, which are three planes: BiLLM and its family
    "bytes-8",  # dense 8 bit: the output head
)
HEAD_FORMAT = "bytes-8"


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The sizes of a decoder that shape its linear layers."""

    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int


@dataclass(frozen=True, order=True)
class Shape:
    """A weight: N rows (output features), K columns (input features), and whose it is."""

    rows: int
    columns: int
    model: str = ""
    layer: str = ""

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


@dataclass(frozen=True)
class Case:
    """One product to time."""

    shape: Shape
    format: str
    tokens: int
    cache: Cache

    @property
    def labels(self) -> tuple[str, ...]:
        """What `--only` is matched against."""
        shape = self.shape
        return (shape.model, shape.layer, str(shape), self.format, f"M={self.tokens}", self.cache)


MODELS = {
    "smollm2-135m": Dimensions(hidden=576, intermediate=1536, key_value=192, vocabulary=49152),
    "llama-3.2-1b": Dimensions(hidden=2048, intermediate=8192, key_value=512, vocabulary=128256),
    "llama-2-7b": Dimensions(hidden=4096, intermediate=11008, key_value=4096, vocabulary=32000),
    "llama-3-8b": Dimensions(hidden=4096, intermediate=14336, key_value=1024, vocabulary=128256),
    "llama-3-70b": Dimensions(hidden=8192, intermediate=28672, key_value=1024, vocabulary=128256),
}


def layers_of(model: str) -> tuple[Shape, ...]:
    """Return the different weights of a model, largest projections last, the head at the end."""
    size = MODELS[model]
    hidden, wide = size.hidden, size.intermediate
    named = (
        ("q", hidden, hidden),
        ("kv", size.key_value, hidden),
        ("up", wide, hidden),
        ("down", hidden, wide),
        ("qkv", hidden + 2 * size.key_value, hidden),
        ("gate_up", 2 * wide, hidden),
        ("head", size.vocabulary, hidden),
    )
    shapes: dict[tuple[int, int], Shape] = {}
    for layer, rows, columns in named:
        shapes.setdefault((rows, columns), Shape(rows, columns, model, layer))
    return tuple(shapes.values())


def find_shape(name: str) -> Shape:
    """Return the shape called NxK, with the first model that has it.

    Raises:
        ValueError: not two positive numbers.
    """
    for model in MODELS:
        for shape in layers_of(model):
            if str(shape) == name:
                return shape
    rows, _, columns = name.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise ValueError(f"shape {name!r}: expected ROWSxCOLUMNS, such as 4096x4096")
    return Shape(int(rows), int(columns))


def quick_cases(*, on_gpu: bool) -> list[Case]:
    """Return what a default run measures: minutes, not hours."""
    if on_gpu:
        large = ("4096x4096", "11008x4096", "8192x8192")
        cases = _product(large, ("sign",), (1, 16, 64, 256), "cold")
        cases += _product(large[:1], ("codes-2", "codes-4", "levels-4", "sparse-10"), (1, 16, 64), "cold")
        return cases + _product(large[:1], ("sign-1",), (1, 64, 256), "cold")
    small = ("576x576", "1536x576", "4096x4096", "11008x4096")
    cases = _product(small, ("sign",), (1, 4, 16, 64, 256), "hot")
    cases += _product(("4096x4096", "11008x4096", "8192x8192"), ("sign",), (1, 16), "cold")
    rest = tuple(name for name in FORMATS if name not in ("sign", "sign-1", HEAD_FORMAT))
    cases += _product(("4096x4096",), rest, (1, 16, 64), "hot")
    cases += _product(("4096x4096",), ("codes-2", "codes-3", "codes-4"), (1,), "cold")
    return cases + _product(("49152x576",), (HEAD_FORMAT,), (1, 16), "hot")


def full_cases(*, on_gpu: bool) -> list[Case]:
    """Return every shape of every model, in every format, at every M."""
    cases: list[Case] = []
    caches: tuple[Cache, ...] = ("cold",) if on_gpu else ("hot", "cold")
    seen: set[tuple[int, int]] = set()
    for model in MODELS:
        for shape in layers_of(model):
            if (shape.rows, shape.columns) in seen:
                continue
            seen.add((shape.rows, shape.columns))
            formats = (HEAD_FORMAT,) if shape.layer == "head" else tuple(f for f in FORMATS if f != HEAD_FORMAT)
            for cache in caches:
                cases += _product((str(shape),), formats, TOKENS, cache)
    return cases


def _product(shapes: Sequence[str], formats: Sequence[str], tokens: Sequence[int], cache: Cache) -> list[Case]:
    return [Case(find_shape(s), f, m, cache) for s in shapes for f in formats for m in tokens]


def chosen(cases: Sequence[Case], words: Sequence[str]) -> list[Case]:
    """Return the cases of which every word matches a label: a model, layer, NxK, format, M=1, hot or cold; * is any."""
    return [case for case in cases if all(fnmatch.filter(case.labels, word) for word in words)]


def in_groups(cases: Sequence[Case]) -> dict[tuple[Shape, str], list[Case]]:
    """Collect the cases that share a weight, so that it is made once."""
    groups: dict[tuple[Shape, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.shape, case.format), []).append(case)
    return groups

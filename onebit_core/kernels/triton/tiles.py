"""Which tile a product takes: measured here, else by the rules shipped for the architecture; no search at call time.

    user table    ~/.cache/onebit/tiles/<gpu>-<triton version>-<hash of the sources>.json, written by `onebit tune`
    shipped       tables/sm_80.json, 86, 89, 90, 120: a tile per number of tokens, from a model, not measured

A rule names a tile and how many programs an SM should have; the splits along K follow from the shape. The number of
tokens from which the dense path is faster follows from the number of products P per weight: the packed kernel spends
about 1.5 P tensor-core steps where the dense one spends one and a fixed price of unpacking, worth `dense_tokens`
tokens:

    dense from  dense_tokens / (1.5 P - 1)  tokens, within 32 and 512; with salient weights from `dense_tokens_sparse`
"""

import contextlib
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from onebit_core.errors import ConfigError
from onebit_core.kernels.triton.prepack import num_blocks

FOLDER = Path(__file__).parent
TABLE_FORMAT = 1
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ARCHITECTURES = (80, 86, 89, 90, 120)
KERNEL_SOURCES = ("expand.py", "sign_gemm.py", "byte_gemm.py", "int8_gemm.py")
MIN_DENSE_TOKENS, MAX_DENSE_TOKENS = 32, 512
MIN_SPLIT_BLOCKS = 4
MAX_SPLITS = 16
MAX_TILES = 1 << 14
"""Tiles of a product that is split; so many counters exist."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows: output features of a program.
        tokens: tokens of a program.
        columns: columns of a step, 128 or 256.
        warps: warps of a program; rows is a multiple of 16 times this.
        stages: steps in flight.
        splits: programs that share the columns of one tile.
    """

    rows: int
    tokens: int
    columns: int
    warps: int
    stages: int
    splits: int = 1

    def __post_init__(self) -> None:
        good = self.rows % (16 * self.warps) == 0 and self.rows & (self.rows - 1) == 0 and self.columns in (128, 256)
        good = good and self.tokens >= 8 and self.tokens & (self.tokens - 1) == 0
        if (
            not good
            or not 1 <= self.splits <= MAX_SPLITS
            or not 1 <= self.stages <= 8
            or self.warps not in (1, 2, 4, 8)
        ):
            raise ConfigError(f"tile {self}: no kernel can be cut like this")


@dataclass(frozen=True)
class Product:
    """What is multiplied, as far as speed depends on it.

    Attributes:
        kind: planes, bytes or int8.
        out_features: O.
        in_features: I.
        planes: products per weight.
        group_size: columns of a coefficient, 0 for a whole row.
        dtype: of the activations: bf16, fp16 or fp32.
    """

    kind: str
    out_features: int
    in_features: int
    planes: int
    group_size: int
    dtype: str

    def key(self, tokens: int) -> str:
        """Return the name of an entry of a table."""
        parts = (self.kind, self.out_features, self.in_features, self.planes, self.group_size, self.dtype, tokens)
        return ",".join(str(part) for part in parts)


@dataclass(frozen=True)
class Gpu:
    """The device tiles are chosen for.

    Attributes:
        name: as the driver says.
        architecture: compute capability, 90 for 9.0.
        processors: multiprocessors.
        fewest_tokens: of a tile. Before Triton 3.8 a Hopper tile of 8 tokens sends unpacked weights through shared
            memory.
    """

    name: str
    architecture: int
    processors: int
    fewest_tokens: int = 8


INTERPRETER = Gpu("interpreter", 90, 4)


@lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    """Describe a CUDA device; a CPU stands for Triton's interpreter."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    architecture = 10 * properties.major + properties.minor
    fewest = 16 if architecture == 90 and triton_version() < (3, 8) else 8
    return Gpu(properties.name, architecture, properties.multi_processor_count, fewest)


def triton_version() -> tuple[int, ...]:
    """Return the installed Triton's version, such as (3, 9)."""
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])


def bucket_of(tokens: int) -> int:
    """Return the smallest bucket that holds so many tokens, or the largest."""
    return next((bucket for bucket in BUCKETS if tokens <= bucket), BUCKETS[-1])


def choose_tile(gpu: Gpu, product: Product, tokens: int) -> Tile:
    """Return the tile for a product, measured if it was."""
    return _tile_of_bucket(gpu, product, bucket_of(tokens))


@lru_cache(maxsize=4096)
def _tile_of_bucket(gpu: Gpu, product: Product, bucket: int) -> Tile:
    """Look the user's table up, then the rules."""
    entry = user_table(gpu).get(product.key(bucket))
    return Tile(*entry) if entry else tile_by_rule(gpu, product, bucket)


def tile_by_rule(gpu: Gpu, product: Product, bucket: int) -> Tile:
    """Return the shipped rule's tile with as many splits as fill the device."""
    rules = shipped_table(gpu.architecture)["rules"]
    rows, tokens, columns, warps, stages, programs = rules[str(max(8, bucket))]
    blocks = num_blocks(product.in_features)
    if product.group_size or product.planes > 1 or product.kind == "bytes" or product.dtype == "fp32":
        # More accumulators, or more bytes a column: a smaller tile keeps them in registers and shared memory.
        widest = (8 if product.group_size else 16) if product.dtype == "fp32" else 32
        rows, tokens, warps = min(rows, 64), min(tokens, widest), min(warps, 4)
    tokens = max(tokens, gpu.fewest_tokens)
    if blocks % (columns // 128) or product.group_size or product.kind != "planes":
        columns = 128
    tiles = math.ceil(product.out_features / rows) * math.ceil(bucket / tokens)
    wanted = min(programs * gpu.processors // tiles, blocks // MIN_SPLIT_BLOCKS, MAX_SPLITS)
    return Tile(rows, tokens, columns, warps, stages, even_splits(blocks, wanted, columns // 128))


def even_splits(blocks: int, wanted: int, step: int = 1) -> int:
    """Return the splits, at most `wanted`, that leave no program without work."""
    per_split = blocks_per_split(blocks, max(1, wanted), step)
    return math.ceil(blocks / per_split)


def blocks_per_split(blocks: int, splits: int, step: int = 1) -> int:
    """Return the blocks of a split, a multiple of the blocks of a step."""
    return math.ceil(math.ceil(blocks / splits) / step) * step


def dense_from(gpu: Gpu, product: Product, *, has_sparse: bool) -> int:
    """Return the number of tokens from which unpacking the weight is faster."""
    table = shipped_table(gpu.architecture)
    measured = user_table(gpu).get("dense_from," + product.key(0))
    if measured:
        return int(measured[0])
    tokens = table["dense_tokens"] / (1.5 * max(1, product.planes) - 1)
    if product.dtype == "fp32":
        tokens *= 4  # three exact bfloat16 products against one without tensor cores
    limit = table["dense_tokens_sparse"] if has_sparse else MAX_DENSE_TOKENS
    return int(min(limit, max(MIN_DENSE_TOKENS, tokens)))


@lru_cache(maxsize=8)
def shipped_table(architecture: int) -> dict[str, Any]:
    """Read the rules of the newest architecture that is not newer than this one."""
    known = max((each for each in ARCHITECTURES if each <= architecture), default=ARCHITECTURES[0])
    table: dict[str, Any] = json.loads((FOLDER / "tables" / f"sm_{known}.json").read_text(encoding="utf-8"))
    return table


def kernel_hash() -> str:
    """Return a name for the kernels' sources: measured tiles die with the code they were measured on."""
    digest = hashlib.sha256()
    for name in KERNEL_SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:12]


def user_table_file(gpu: Gpu, folder: Path | None = None) -> Path:
    """Return where `onebit tune` keeps what it measured on this device with this Triton and these kernels."""
    import triton

    folder = folder or Path.home() / ".cache" / "onebit" / "tiles"
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return folder / f"{name}-{triton.__version__}-{kernel_hash()}.json"


@lru_cache(maxsize=8)
def user_table(gpu: Gpu) -> dict[str, list[int]]:
    """Read the measured tiles of a device; a missing or damaged file is no table."""
    try:
        return read_user_table(user_table_file(gpu))
    except (OSError, ValueError, RuntimeError):
        return {}


def read_user_table(file: Path) -> dict[str, list[int]]:
    """Read and check a table.

    Raises:
        OSError: no such file.
        ValueError: not a table of this format, or a damaged one.
    """
    table = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or table.get("format") != TABLE_FORMAT:
        raise ValueError(f"{file}: not a table of format {TABLE_FORMAT}")
    entries: Any = table.get("entries")
    if not isinstance(entries, dict) or not all(_is_entry(key, entry) for key, entry in entries.items()):
        raise ValueError(f"{file}: its entries are damaged")
    return dict(entries)


def _is_entry(key: str, entry: Any) -> bool:
    """Whether an entry is a number of tokens or the fields of a tile."""
    if not isinstance(entry, list) or not all(isinstance(number, int) for number in entry):
        return False
    if key.startswith("dense_from,"):
        return len(entry) == 1
    try:
        Tile(*entry)
    except (TypeError, ConfigError):
        return False
    return True


def write_user_table(file: Path, gpu: Gpu, entries: dict[str, list[int]]) -> None:
    """Add entries to a table, in one step: a reader never sees half a file."""
    with contextlib.suppress(OSError, ValueError):
        entries = read_user_table(file) | entries
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    document = {"format": TABLE_FORMAT, "gpu": asdict(gpu), "entries": dict(sorted(entries.items()))}
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
    user_table.cache_clear()
    _tile_of_bucket.cache_clear()

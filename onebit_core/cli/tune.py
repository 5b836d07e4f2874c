"""`onebit tune`: measure which tiles the GPU kernels should take on this device, once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.errors import BackendUnavailable, ConfigError
from onebit_core.progress import Watch

if TYPE_CHECKING:
    import torch

    from onebit_core.kernels import Packed
    from onebit_core.kernels.triton.tuning import Timing


def tune(
    artifact: Annotated[Path | None, typer.Argument(help="Folder of a compressed model: tune its products.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="N,K[,PLANES[,GROUP]]",
            help="Output and input features of a product, planes (default 1), columns of a scale (default 0, a row's); "
            "may be repeated.",
        ),
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the activations.")] = "bfloat16",
    tokens: Annotated[str, typer.Option("--m", help="Numbers of tokens.")] = "1,2,4,8,16,32,64,128,256",
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    progress: Annotated[
        ProgressMode, typer.Option(help="auto, bar, json (one object a line on standard output) or none.")
    ] = "auto",
) -> None:
    """Time the GPU kernels' tiles on this device and keep the fastest in ~/.cache/onebit/tiles."""
    shapes = [parse_shape(text) for text in shape or []]
    numbers = parse_tokens(tokens)
    if (artifact is None) == (not shapes):
        raise ConfigError("tune: give either an ARTIFACT or --shape")
    _require_gpu(device)
    import torch

    from onebit_core.kernels.triton import tiles, tuning

    torch_dtype = getattr(torch, dtype)
    where = torch.device(device)
    with progress_watch(progress) as watch, torch.inference_mode(), torch.cuda.device(where):
        if artifact is not None:
            weights = _weights_of(artifact, device, dtype)
        else:
            weights = [tuning.random_weight(*each, device=where) for each in shapes]
        timings = _time_all(weights, torch_dtype, numbers, watch)
    gpu = tiles.gpu_of(weights[0].parts[0].device)
    file = tiles.user_table_file(gpu)
    tiles.write_user_table(file, gpu, tuning.entries_of(timings))
    if progress == "json":
        rows = [{"product": each.product.key(each.tokens), "microseconds": each.packed_us} for each in timings]
        print_event("result", file=str(file), timings=rows)
    else:
        Console().print(timings_table(timings))
        print(f"written to {file}")


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """Read N,K[,PLANES[,GROUP]].

    Raises:
        ConfigError: another form, or numbers that cannot be meant.
    """
    numbers = _integers(text)
    if numbers is None or len(numbers) not in (2, 3, 4):
        raise ConfigError(f"--shape {text}: expected N,K or N,K,PLANES or N,K,PLANES,GROUP, such as 4096,4096,4,128")
    rows, columns, planes, group = (*numbers, *(1, 0)[len(numbers) - 2 :])
    if min(rows, columns) < 1 or not 1 <= planes <= 8 or group < 0 or (group and columns % group):
        raise ConfigError(f"--shape {text}: sizes are positive, planes 1 to 8, and a group divides K")
    return rows, columns, planes, group


def parse_tokens(text: str) -> list[int]:
    """Read numbers of tokens.

    Raises:
        ConfigError: not a list of positive numbers.
    """
    numbers = _integers(text)
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--m {text}: expected numbers of tokens, such as 1,8,64")
    return sorted(set(numbers))


def _integers(text: str) -> list[int] | None:
    """Read integers between commas, or None."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return None


def _require_gpu(device: str) -> None:
    """Refuse to go on without a device that the kernels run on.

    Raises:
        BackendUnavailable: no Triton, no GPU, or one too old.
    """
    from onebit_core.kernels import resolve_device
    from onebit_core.kernels.triton import why_unavailable

    reason = why_unavailable()
    if reason is not None:
        raise BackendUnavailable(f"tune: {reason}")
    if not resolve_device(device).startswith("cuda"):
        raise BackendUnavailable(f"tune: device {device!r} is no GPU; there is nothing to tune")


def _weights_of(artifact: Path, device: str, dtype: str) -> "list[Packed]":
    """Load a model and return every weight that one pass multiplies, joined as it is when serving.

    Raises:
        ConfigError: the model has no packed weights.
    """
    import torch

    from onebit_core.artifact.reader import load_model
    from onebit_core.kernels.triton.tuning import recorded

    model = load_model(artifact, device=device, dtype=dtype, backend="triton").model
    with recorded() as weights:
        model(torch.zeros(1, 1, dtype=torch.long, device=device))
    if not weights:
        raise ConfigError(f"{artifact}: no product of this model runs in the GPU kernels")
    return weights


def _time_all(weights: "list[Packed]", dtype: "torch.dtype", tokens: list[int], watch: Watch) -> "list[Timing]":
    """Time every product at every number of tokens."""
    from onebit_core.kernels.triton import tiles, tuning

    products = tuning.products_in(weights, dtype)
    gpu = tiles.gpu_of(weights[0].parts[0].device)
    work = [(product, number) for product in products for number in tokens]
    total = sum(len(tuning.candidates(gpu, product, number)) for product, number in work)
    done, timings = 0, []
    watch.report("tune", 0, total)
    for product, number in work:

        def count(key: str = product.key(number)) -> None:
            nonlocal done
            done += 1
            watch.report("tune", done, total, product=key)

        timings.append(tuning.tune_product(product, products[product], dtype, number, count))
    return timings


def timings_table(timings: "list[Timing]") -> Table:
    """Show the fastest tiles."""
    table = Table(title="fastest tiles", title_justify="left")
    for heading in ("product", "tokens", "tile", "splits", "us", "shipped us", "dense us"):
        table.add_column(heading, justify="left" if heading in ("product", "tile") else "right")
    for timing in timings:
        tile = timing.tile
        table.add_row(
            timing.product.key(0).rsplit(",", 1)[0],
            str(timing.tokens),
            f"{tile.rows}x{tile.tokens}x{tile.columns}, {tile.warps} warps, {tile.stages} stages",
            str(tile.splits),
            f"{timing.packed_us:.2f}",
            f"{timing.rule_us:.2f}",
            "" if timing.dense_us is None else f"{timing.dense_us:.2f}",
        )
    return table

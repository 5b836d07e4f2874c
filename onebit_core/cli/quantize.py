"""onebit quantize: flags to QuantizeConfig, then the pipeline; onebit methods: the table of methods.

What needs torch is imported inside the commands, so that help, version and mistakes in flags answer at once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from onebit_core.artifact.identity import read_manifest
from onebit_core.cli.forecast import print_forecast
from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.errors import ConfigError

Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Text, JSON lines or Parquet file, folder, SOURCE#COLUMN, or self: (the model writes); repeat to mix. "
        "Default: builtin:python.",
    ),
]
CalibrationWeight = Annotated[
    list[float] | None,
    typer.Option(metavar="W", help="Share of each --calibration, in the same order. Default: equal shares."),
]
Bits = Annotated[
    float | None, typer.Option(help="Average true bits a weight, spread over layers by measured sensitivity.")
]


def quantize(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, hub id, or GGUF file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    method: Annotated[str | None, typer.Option(help="How weights are found; `onebit methods` lists them.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the method; repeat for more.")
    ] = None,
    calibration: Calibration = None,
    calibration_weight: CalibrationWeight = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration windows in all. Default: 32; to reconstruct light 64, full 256.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per calibration window. Default: 1024.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the windows. Default: 0.")] = None,
    bits: Bits = None,
    rotate: Annotated[
        str | None, typer.Option(help="Rotate the inputs of linears: off (the default), auto (where it helps), all.")
    ] = None,
    reconstruct: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Train each block after quantizing it: off, light or full.")
    ] = None,
    embedding_bits: Annotated[int | None, typer.Option(help="Of embedding and head: 4, 8 or 16 (as is).")] = None,
    name: Annotated[str | None, typer.Option(help="Model name to serve under. Default: model and method.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N, or auto (the default).")] = None,
    activations: Annotated[str | None, typer.Option(help="Calibration samples in memory, on disk, or auto.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with a whole configuration; flags given beside it win.")
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep finished blocks here; a run with the same one continues.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it will give and take - bits, memory, time - and do nothing.")
    ] = False,
    progress: Annotated[ProgressMode, typer.Option(help="How to show progress.")] = "auto",
) -> None:
    """Quantize MODEL with a method and write an artifact.

    Example: onebit quantize ./SmolLM2 --method gptq --set bits=3 --calibration news.txt --out ./SmolLM2-3bit
    """
    values = _read_config(config)
    values.update(
        _given(model=model, method=method, bits=bits, rotation=rotate, embedding_bits=embedding_bits, name=name)
    )
    values.update(_given(device=device, activations=activations))
    amounts = _given(text=calibration, weights=calibration_weight, samples=samples, tokens=tokens, seed=seed)
    _merge(values, "settings", parse_settings(settings or []))
    _merge(values, "reconstruction", _given(preset=reconstruct))
    _merge(values, "calibration", amounts)
    for key, where in (("model", "MODEL"), ("method", "--method")):
        if key not in values:
            raise ConfigError(f"{where} is missing; see onebit quantize --help")
    if plan:
        _show_plan(values, as_json=progress == "json")
    elif out is None:
        raise ConfigError("--out is missing: name the folder to write")
    else:
        _run(values, out, work_dir, progress)


def methods() -> None:
    """List the methods with their settings and defaults."""
    from onebit_core.methods import METHODS

    table = Table("method", "what it does", "settings (defaults)", show_lines=True)
    for method_name, method in METHODS.items():
        defaults = dataclasses.asdict(method.config())  # type: ignore[call-overload]  # every config is a dataclass
        table.add_row(method_name, method.summary, "\n".join(f"{key}={value}" for key, value in defaults.items()))
    Console().print(table)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Turn KEY=VALUE words into values; what is valid JSON is read as such, anything else is text.

    Raises:
        ConfigError: a word without `=`.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {pair!r}: write KEY=VALUE, such as --set bits=3")
        try:
            values[key] = json.loads(text)
        except ValueError:
            values[key] = text
    return values


def _given(**flags: Any) -> dict[str, Any]:
    """Return the flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}


def _merge(values: dict[str, Any], key: str, flags: dict[str, Any]) -> None:
    """Let flags win over a part of the configuration file."""
    part = values.setdefault(key, {})
    if not isinstance(part, dict):
        raise ConfigError(f"--config: {key} is {part!r}; expected an object with named fields")
    part.update(flags)


def _read_config(file: Path | None) -> dict[str, Any]:
    """Read a configuration file."""
    if file is None:
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected an object with named fields")
    return values


def _run(values: dict[str, Any], out: Path, work_dir: Path | None, progress: ProgressMode) -> None:
    """Quantize, and say what was written."""
    from onebit_core.pipeline.config import QuantizeConfig
    from onebit_core.pipeline.run import quantize_model

    with progress_watch(progress) as watch:
        quantize_model(QuantizeConfig.from_dict(values), out, watch=watch, work=work_dir)
    if progress == "json":
        print_event("result", artifact=str(out))
    else:
        _print_result(out)


def _show_plan(values: dict[str, Any], *, as_json: bool) -> None:
    """Check a configuration and print what it would give and take."""
    from onebit_core.model.loading import open_original
    from onebit_core.pipeline.config import QuantizeConfig
    from onebit_core.pipeline.forecast import forecast
    from onebit_core.pipeline.plan import make_plan

    config = QuantizeConfig.from_dict(values)
    original = open_original(config.model)
    found = forecast(original, make_plan(original, config), config)
    if as_json:
        print_event("plan", **dataclasses.asdict(found))
    else:
        print_forecast(Console(), found)


def _print_result(out: Path) -> None:
    """Print what was written, in a few lines."""
    manifest = read_manifest(out)
    size = sum(manifest.bytes_by_part.values())
    Console().print(
        f"[bold]{out}[/bold]: {manifest.method}, {manifest.bits.linear_true:.3f} bits per linear weight "
        f"({manifest.bits.linear_nominal:.3g} nominal), {manifest.bits.whole_model:.3f} over the whole model, "
        f"{size / 1e6:.1f} MB\nNext: onebit evaluate {out} --text NAME=FILE   and   onebit-serve {out}",
        soft_wrap=True,
        highlight=False,
    )

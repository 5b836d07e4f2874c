"""onebit train: a finished artifact learns from its original, at the same bits."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from onebit_core.artifact.identity import read_manifest
from onebit_core.cli.forecast import print_training_forecast
from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.cli.quantize import parse_settings
from onebit_core.errors import ConfigError

USUAL_STEPS = 500


def train(
    artifact: Annotated[Path, typer.Argument(help="Folder of the compressed model to start from.")],
    text: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="Text, JSON lines or Parquet file, folder, SOURCE#COLUMN, or self: (the original writes); "
            "repeat to mix.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist.")] = None,
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Share of each --text, in order. Default: equal shares.")
    ] = None,
    original: Annotated[
        str | None, typer.Option(help="What the artifact was made from. Default: where its manifest says.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = USUAL_STEPS,
    batch: Annotated[int | None, typer.Option(help="Windows per step. Default: 4.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per window. Default: 1024.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of docs/training.md; repeat for more."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Model name to serve under. Default: the artifact's, -trained.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep checkpoints here; a run with the same one continues.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it will take - memory, time - and do nothing.")
    ] = False,
    progress: Annotated[ProgressMode, typer.Option(help="How to show progress.")] = "auto",
) -> None:
    """Train all layers of ARTIFACT together until it says what its original says; bits stay as they are.

    Example: onebit train ./SmolLM2-1bit --text news.txt --steps 200 --out ./SmolLM2-1bit-trained
    """
    given = {"batch": batch, "tokens": tokens, "weights": weight}
    training = {
        "text": text,
        "steps": steps,
        **{key: value for key, value in given.items() if value is not None},
        **parse_settings(settings or []),
    }
    values = {"artifact": str(artifact), "original": original, "training": training, "name": name, "device": device}
    if plan:
        _show_plan(values, as_json=progress == "json")
    elif out is None:
        raise ConfigError("--out is missing: name the folder to write")
    else:
        _run(values, out, work_dir, progress)


def _run(values: dict[str, Any], out: Path, work_dir: Path | None, progress: ProgressMode) -> None:
    """Train, and say what came of it."""
    from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
    from onebit_core.qat import joined

    with joined() as world:
        with progress_watch(progress if world.is_first else "none") as watch:
            train_artifact(TrainArtifactConfig.from_dict(values), out, watch=watch, work=work_dir)
        if not world.is_first:
            return
    if progress == "json":
        print_event("result", artifact=str(out))
        return
    manifest = read_manifest(out)
    before, after = manifest.training["held_out_kl"]
    Console().print(
        f"[bold]{out}[/bold]: {manifest.training['steps_taken']} steps, KL on windows held out {before:.3f} to "
        f"{after:.3f} nats per token, {manifest.bits.linear_true:.3f} bits per linear weight as before\n"
        f"Next: onebit evaluate {out} --text NAME=FILE   and   onebit-serve {out}",
        soft_wrap=True,
        highlight=False,
    )


def _show_plan(values: dict[str, Any], *, as_json: bool) -> None:
    """Check a configuration and print what it would take."""
    from onebit_core.pipeline.train_artifact import TrainArtifactConfig, forecast_training

    found = forecast_training(TrainArtifactConfig.from_dict(values))
    if as_json:
        print_event("plan", **dataclasses.asdict(found))
    else:
        print_training_forecast(Console(), found)

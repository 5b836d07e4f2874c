"""onebit adapt: a finished artifact learns a text, in scales of a megabyte beside it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.cli.quantize import parse_settings

USUAL_STEPS = 200


def adapt(
    artifact: Annotated[Path, typer.Argument(help="Folder of the compressed model.")],
    text: Annotated[
        list[str],
        typer.Option(
            metavar="TEXT",
            help="What it shall learn: text, JSON lines or Parquet file, folder, or SOURCE#COLUMN; repeat to mix.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    name: Annotated[
        str | None, typer.Option(help="What it is served as, behind the model's name. Default: the folder's name.")
    ] = None,
    weight: Annotated[
        list[float] | None, typer.Option(metavar="W", help="Share of each --text, in order. Default: equal shares.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = USUAL_STEPS,
    batch: Annotated[int | None, typer.Option(help="Windows per step. Default: 4.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens per window. Default: 512.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of docs/adapters.md; repeat for more."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    work_dir: Annotated[
        Path | None, typer.Option(help="Keep checkpoints here; a run with the same one continues.")
    ] = None,
    progress: Annotated[ProgressMode, typer.Option(help="How to show progress.")] = "auto",
) -> None:
    """Learn scales for ARTIFACT from your text: an adapter of a megabyte, served as MODEL:NAME beside others.

    Example: onebit adapt ./small --text letters.txt --out ./letters, then onebit-serve ./small --adapter ./letters
    """
    from onebit_core.pipeline.adapt import USUAL_RATE

    given = {"batch": batch, "tokens": tokens, "weights": weight}
    training = {
        "text": text,
        "steps": steps,
        "scale_rate": USUAL_RATE,
        **{key: value for key, value in given.items() if value is not None},
        **parse_settings(settings or []),
    }
    values = {"artifact": str(artifact), "name": name or out.name, "training": training, "device": device}
    _run(values, out, work_dir, progress)


def _run(values: dict[str, Any], out: Path, work_dir: Path | None, progress: ProgressMode) -> None:
    """Train, and say what came of it."""
    from onebit_core.pipeline.adapt import AdaptConfig, adapt_artifact

    with progress_watch(progress) as watch:
        info = adapt_artifact(AdaptConfig.from_dict(values), out, watch=watch, work=work_dir)
    if progress == "json":
        print_event("result", adapter=str(out))
        return
    before, after = info.training["held_out_loss"]
    Console().print(
        f"[bold]{out}[/bold]: {info.training['steps_taken']} steps, loss on windows held out {before:.3f} to "
        f"{after:.3f} nats per token, scales of {info.layers} layers\n"
        f"Next: onebit-serve {values['artifact']} --adapter {out}   and ask for the model {info.base_name}:{info.name}",
        soft_wrap=True,
        highlight=False,
    )

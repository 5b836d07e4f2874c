"""onebit import: a model that OneBit's authors have published becomes an artifact."""

from pathlib import Path
from typing import Annotated

import typer

from onebit_core.artifact.identity import read_manifest
from onebit_core.cli.output import ProgressMode, print_event, progress_watch


def import_onebit(
    model: Annotated[str, typer.Argument(help="Folder or hub id, as OneBit's code saves it, in safetensors.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    name: Annotated[str | None, typer.Option(help="Model name to serve under. Default: the folder's.")] = None,
    progress: Annotated[ProgressMode, typer.Option(help="How to show progress.")] = "auto",
) -> None:
    """Make an artifact of a model published by OneBit's authors (model_type bitllama), sign by sign.

    Example: onebit import ./onebit_llama_7b --out ./llama-7b-onebit
    """
    from onebit_core.pipeline.import_onebit import import_onebit as run

    with progress_watch(progress) as watch:
        run(model, out, name=name, watch=watch)
    if progress == "json":
        print_event("result", artifact=str(out))
        return
    bits = read_manifest(out).bits
    print(f"{out}: {bits.linear_true:.3f} bits per linear weight, {bits.whole_model:.2f} of the whole model")
    print(f"Next: onebit evaluate {out} --original MODEL --text NAME=FILE   and   onebit-serve {out}")

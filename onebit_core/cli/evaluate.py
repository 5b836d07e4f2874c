"""`onebit evaluate`: what an artifact lost against its original, on named texts."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.cli.tables import evaluation_table
from onebit_core.errors import ConfigError


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Folder of the compressed model.")],
    text: Annotated[
        list[str],
        typer.Option(
            "--text", metavar="NAME=FILE", help="A text to evaluate on: file, folder or builtin text; may be repeated."
        ),
    ],
    original: Annotated[
        str | None,
        typer.Option(help="The uncompressed model: folder, hub id or GGUF file. Default: the recorded one."),
    ] = None,
    windows: Annotated[int, typer.Option(min=0, help="Windows of each text; 0 for all it has.")] = 60,
    window_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of both models' forward passes.")
    ] = "auto",
    progress: Annotated[
        ProgressMode, typer.Option(help="auto, bar, json (one object a line on standard output) or none.")
    ] = "auto",
) -> None:
    """Measure perplexity, KL divergence and top-1 agreement against the original, and write them into the artifact."""
    from onebit_core.evaluation.run import EvaluateConfig, evaluate_artifact

    config = EvaluateConfig(
        texts=parse_texts(text),
        original=original,
        windows=windows or None,
        window_tokens=window_tokens,
        device=device,
        dtype=dtype,
    )
    with progress_watch(progress) as watch:
        results = evaluate_artifact(artifact, config, watch)
    if progress == "json":
        print_event("result", artifact=str(artifact), evaluation=[result.to_dict() for result in results])
    else:
        Console().print(evaluation_table(results))


def parse_texts(arguments: list[str]) -> dict[str, str]:
    """Read NAME=FILE arguments.

    Raises:
        ConfigError: an argument has another form, or a name is given twice.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        name, separator, file = argument.partition("=")
        if not (name and separator and file):
            raise ConfigError(f"--text {argument}: expected NAME=FILE, such as wikitext2=wiki.test.raw")
        if name in texts:
            raise ConfigError(f"--text {argument}: the name {name} is given twice")
        texts[name] = file
    return texts

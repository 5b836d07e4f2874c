"""`onebit evaluate`: what an artifact lost against its original, on named texts and tasks."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.cli.tables import print_evaluation, tasks_table
from onebit_core.errors import ConfigError


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="Folder of the compressed model.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="NAME=FILE", help="A text to evaluate on: file, folder or builtin text; may be repeated."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="NAME[=FILE]", help="Questions, .jsonl, or a task of lm-eval's; may be repeated."
        ),
    ] = None,
    task_limit: Annotated[
        int, typer.Option(min=0, help="Questions of each task, shuffled with a fixed seed; 0 for all.")
    ] = 0,
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
    """Measure perplexity, KL divergence, top-1 agreement and zero-shot accuracy, and write them into the artifact."""
    from onebit_core.evaluation.run import EvaluateConfig, evaluate_artifact

    config = EvaluateConfig(
        texts=parse_texts(text or []),
        tasks=parse_tasks(task or []),
        task_limit=task_limit or None,
        original=original,
        windows=windows or None,
        window_tokens=window_tokens,
        device=device,
        dtype=dtype,
    )
    with progress_watch(progress) as watch:
        measured = evaluate_artifact(artifact, config, watch)
    if progress == "json":
        texts, tasks = ([result.to_dict() for result in results] for results in (measured.texts, measured.tasks))
        print_event("result", artifact=str(artifact), evaluation=texts, tasks=tasks)
        return
    if measured.texts:
        print_evaluation(Console(), measured.texts)
    if measured.tasks:
        Console().print(tasks_table(measured.tasks))


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


def parse_tasks(arguments: list[str]) -> dict[str, str | None]:
    """Read NAME or NAME=FILE arguments; a name alone is one of lm-eval's.

    Raises:
        ConfigError: an argument has another form, or a name is given twice.
    """
    tasks: dict[str, str | None] = {}
    for argument in arguments:
        name, separator, file = argument.partition("=")
        if not name or bool(separator) != bool(file):
            raise ConfigError(f"--task {argument}: expected NAME=FILE.jsonl, or the name of a task of lm-eval's")
        if name in tasks:
            raise ConfigError(f"--task {argument}: the name {name} is given twice")
        tasks[name] = file or None
    return tasks

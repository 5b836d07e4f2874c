"""onebit: the subcommands, and the one place where an error becomes a sentence and an exit code.

0  done
1  a bug: the traceback is shown
2  the request or its input cannot be used; one sentence on standard error says what and what to do
3  cancelled by SIGINT or SIGTERM; finished blocks are kept where --work-dir says
"""

import sys
from typing import Any

import typer

import onebit_core
from onebit_core.cli.adapt import adapt
from onebit_core.cli.evaluate import evaluate
from onebit_core.cli.import_onebit import import_onebit
from onebit_core.cli.inspect import inspect
from onebit_core.cli.output import print_event
from onebit_core.cli.quantize import methods, quantize
from onebit_core.cli.train import train
from onebit_core.cli.tune import tune
from onebit_core.cli.write_text import write_text
from onebit_core.errors import Cancelled, OnebitError

app = typer.Typer(
    name="onebit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize language models to one or two bits a weight, and measure what that cost.",
)
app.command()(quantize)
app.command()(evaluate)
app.command()(train)
app.command()(adapt)
app.command("import")(import_onebit)
app.command()(inspect)
app.command()(methods)
app.command()(tune)
app.command()(write_text)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"onebit {onebit_core.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Options before the subcommand."""
    del version


def main() -> Any:
    """Run the command line and exit."""
    as_json = ("json" in sys.argv and "--progress" in sys.argv) or "--progress=json" in sys.argv
    try:
        app()
    except Cancelled as error:
        _report(as_json, "cancelled", error)
        sys.exit(3)
    except OnebitError as error:
        _report(as_json, "error", error)
        sys.exit(2)


def _report(as_json: bool, event: str, error: OnebitError) -> None:
    """Say what happened: a line of JSON for a program, a sentence for a person."""
    if as_json:
        print_event(event, type=type(error).__name__, message=str(error))
    word = "error" if event == "error" else "cancelled"
    typer.echo(f"{word}: {error}", err=True)


if __name__ == "__main__":
    main()

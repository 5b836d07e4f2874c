"""`onebit inspect`: what an artifact is, where its bytes are, and what it lost."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from onebit_core.artifact.golden import read_golden
from onebit_core.artifact.identity import read_manifest, read_report
from onebit_core.artifact.manifest import Manifest, Report
from onebit_core.cli.tables import bytes_table, layers_table, print_evaluation, tasks_table
from onebit_core.errors import ConfigError
from onebit_core.evaluation.report_page import layer_notes, render_page, worst_layers


def inspect(
    artifact: Annotated[Path, typer.Argument(help="Folder of the compressed model.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with plots to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print manifest and report as JSON.")] = False,
) -> None:
    """Show what an artifact is: bits, bytes by part, errors by layer, accuracy against the original."""
    manifest, report = read_manifest(artifact), read_report(artifact)
    if html is not None:
        _write(html, render_page(manifest, report))
    if as_json:
        print(json.dumps({"manifest": manifest.to_dict(), "report": report.to_dict()}, indent=2))
    else:
        _print_tables(Console(), artifact, manifest, report)
    if html is not None and not as_json:
        print(f"page written to {html}")


def _write(file: Path, page: str) -> None:
    """Write the page, or say why not."""
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file}: cannot be written: {error.strerror}") from error


def _training_note(training: dict[str, Any]) -> str:
    """Say how long all layers were trained together, and what that brought."""
    if not training:
        return "none"
    before, after = training["held_out_kl"]
    return (
        f"{training['steps_taken']} steps of {training['batch']} windows of {training['tokens']} tokens, "
        f"best at step {training['best_step']}: KL on windows held out {before:.3f} to {after:.3f} nats per token"
    )


def _golden_note(artifact: Path, manifest: Manifest) -> str:
    """Say what a server can check the artifact against; a damaged file is an error here too."""
    golden = read_golden(artifact, manifest)
    if golden is None:
        return "none; a server cannot check that it computes this artifact right"
    tokens = sum(len(prompt.completion) for prompt in golden.prompts)
    return f"{len(golden.prompts)} with {tokens} tokens, by {golden.backend} in {golden.dtype}"


def _print_tables(console: Console, artifact: Path, manifest: Manifest, report: Report) -> None:
    """Print the facts, then the tables."""
    bits, source = manifest.bits, manifest.source
    facts = {
        "name": manifest.name,
        "method": manifest.method,
        "settings": ", ".join(f"{key}={value}" for key, value in manifest.settings.items()) or "none",
        "reconstruction": ", ".join(f"{key}={value}" for key, value in manifest.reconstruction.items()) or "none",
        "training": _training_note(manifest.training),
        "source": f"{source.model} ({source.architecture}, {source.parameters:,} parameters)",
        "source sha256": source.sha256,
        "bits per weight": f"{bits.linear_true:.3f} linears as counted, {bits.linear_nominal:.3f} as advertised, "
        f"{bits.whole_model:.3f} whole model",
        "golden prompts": _golden_note(artifact, manifest),
        "created": manifest.created,
    }
    for name, value in facts.items():
        console.print(Text.assemble((f"{name:16} ", "bold"), value))
    console.print()
    console.print(bytes_table(manifest))
    if report.layers:
        console.print(layers_table(worst_layers(report), len(report.layers)))
    for note, names in layer_notes(report).items():
        console.print(Text(f"{note}: {', '.join(names)}"))
    if report.evaluation:
        print_evaluation(console, report.evaluation)
    if report.tasks:
        console.print(tasks_table(report.tasks))
    if not report.evaluation and not report.tasks:
        console.print("not evaluated yet: run onebit evaluate")

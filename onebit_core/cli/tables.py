"""The tables the commands print; names in them come from files, so they are never read as markup."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onebit_core.artifact.manifest import Accuracy, EvaluationResult, LayerReport, Manifest, Perplexity, TaskResult
from onebit_core.evaluation.accuracy import difference, mean_difference, mean_over_tasks
from onebit_core.evaluation.report_page import parts_of


def table(title: str, first: Sequence[str], others: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Lay out rows under a title.

    Args:
        title: above the table.
        first: headings of columns aligned left.
        others: headings of columns aligned right.
        rows: one string a column.
    """
    laid_out = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in first:
        laid_out.add_column(heading, overflow="fold")
    for heading in others:
        laid_out.add_column(heading, justify="right")
    for row in rows:
        laid_out.add_row(*(Text(cell) for cell in row))
    return laid_out


def evaluation_table(results: Sequence[EvaluationResult]) -> Table:
    """Show what an artifact lost on each text, 80 columns wide; after ± stand standard errors over windows."""
    rows = [
        (
            result.dataset,
            with_error(result.original),
            with_error(result.compressed),
            _ratio(result.compressed.value / result.original.value),
            f"{result.kl_mean:.3g}±{result.kl_standard_error:.1g}",
            f"{result.kl_p99:.3g}",
            f"{100 * result.top1_agreement:.1f}±{100 * result.top1_standard_error:.1f}",
        )
        for result in results
    ]
    headings = ("ppl before", "ppl after", "ratio", "KL, nats", "KL 99 %", "top-1 %")
    return table("accuracy against the original", ("text",), headings, rows)


def print_evaluation(console: Console, results: Sequence[EvaluationResult]) -> None:
    """Print what an artifact lost, and why figures are not what they seem."""
    console.print(evaluation_table(results))
    for result in results:
        if result.warning:
            console.print(Text(f"{result.dataset}: {result.warning}", style="yellow"), soft_wrap=True)


def tasks_table(results: Sequence[TaskResult]) -> Table:
    """Show zero-shot accuracy in percent, 80 columns wide; after ± stand standard errors over questions."""
    rows = [
        (
            result.task,
            str(result.questions),
            f"{100 * result.chance:.0f}",
            _percent(result.original),
            _percent(result.compressed),
            _percent(difference(result), sign="+"),
            _norms(result),
            f"{100 * result.agreement:.1f}",
        )
        for result in results
    ]
    if len(results) > 1:
        before, after = (mean_over_tasks([getattr(one, of) for one in results]) for of in ("original", "compressed"))
        means = (_percent(before), _percent(after), _percent(mean_difference(results), sign="+"))
        rows.append(("mean", "", "", *means, "", f"{sum(100 * one.agreement for one in results) / len(results):.1f}"))
    headings = ("asked", "chance", "before", "after", "change", "norm", "same")
    return table("zero-shot accuracy in percent, against the original", ("task",), headings, rows)


def bytes_table(manifest: Manifest) -> Table:
    """Show where the bytes of an artifact are, and what they add to each parameter of the model."""
    parts = parts_of(manifest)
    total = sum(part.size_bytes for part in parts)
    rows = [
        (part.name.replace("_", " "), f"{part.size_bytes:,}", f"{part.bits:.3f}", f"{part.share:.1%}") for part in parts
    ]
    rows.append(("all", f"{total:,}", f"{sum(part.bits for part in parts):.3f}", "100.0%"))
    return table("bytes and bits by part", ("part",), ("bytes", "bits per parameter", "share"), rows)


def layers_table(layers: Sequence[LayerReport], total: int) -> Table:
    """Show the worst layers."""
    rows = [
        (
            str(layer.block),
            layer.name.partition(f".{layer.block}.")[2] or layer.name,
            layer.method,
            f"{layer.bits:.3f}",
            f"{layer.weight_error:.4g}",
            "-" if layer.output_error is None else f"{layer.output_error:.4g}",
        )
        for layer in layers
    ]
    title = f"the worst {len(layers)} of {total} layers, by squared relative error"
    return table(title, ("block", "layer", "method"), ("bits", "weight error", "output error"), rows)


def with_error(one: Perplexity) -> str:
    """Write a perplexity with its standard error: `20.85±0.61`."""
    if one.value < 1000:
        return f"{one.value:.4g}±{one.standard_error:.2g}"
    if one.value < 1e6:
        return f"{one.value:.0f}±{one.standard_error:.0f}"
    return f"{one.value:.2g}±{one.standard_error:.1g}"


def _ratio(value: float) -> str:
    """Write how many times worse, in at most seven characters."""
    return f"{value:.4g}" if value < 1000 else f"{value:.2g}"


def _percent(one: Accuracy, sign: str = "") -> str:
    """Write an accuracy or a difference: `52.1±1.0`."""
    return f"{100 * one.value:{sign}.1f}±{100 * one.standard_error:.1f}"


def _norms(result: TaskResult) -> str:
    """Write both length-normalized accuracies, where the task has them: `42.5 40.0`."""
    both = [one for one in (result.original_norm, result.compressed_norm) if one is not None]
    return " ".join(f"{100 * one.value:.1f}" for one in both) or "-"

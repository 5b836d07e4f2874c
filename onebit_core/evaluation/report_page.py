"""What an artifact is and what it lost, on one page that needs nothing else.

The page holds no script and loads nothing: style and pictures are inside it, so it can be mailed, archived beside
the artifact, or opened from a disk years later. Names in it come from files of unknown origin; the template escapes
everything but the pictures, which are made here.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from onebit_core.artifact.manifest import LayerReport, Manifest, Report
from onebit_core.evaluation import plots
from onebit_core.evaluation.accuracy import difference, mean_over_tasks

TEMPLATE = "report_page.html.j2"
WORST_LAYERS = 10


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of bytes in an artifact; `share` is of all its tensors, 0 to 1, `bits` per parameter of the model."""

    name: str
    size_bytes: int
    share: float
    bits: float


def render_page(manifest: Manifest, report: Report) -> str:
    """Return the page as HTML text.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"difference": difference, "mean_over_tasks": mean_over_tasks}
    parts = parts_of(manifest)
    pictures = {
        "bits": plots.bits_per_weight(manifest),
        "bytes": plots.bytes_by_part({part.name: part.size_bytes for part in parts}),
        "layers": plots.layer_errors(report.layers) if report.layers else "",
        "training": plots.learning_curve(report.training) if report.training else "",
        "perplexity": plots.perplexities(report.evaluation) if report.evaluation else "",
        "divergence": plots.divergences(report.evaluation) if report.evaluation else "",
        "tasks": plots.accuracies(report.tasks) if report.tasks else "",
    }
    return environment.get_template(TEMPLATE).render(
        manifest=manifest,
        report=report,
        parts=parts,
        total_bytes=sum(manifest.bytes_by_part.values()),
        worst=worst_layers(report),
        notes=layer_notes(report),
        # Made by plots, which escape what they write: the only text that goes into the page as it is.
        pictures={name: Markup(svg) for name, svg in pictures.items()},
    )


def parts_of(manifest: Manifest) -> tuple[Part, ...]:
    """Return the parts that have any bytes, the largest first."""
    total = sum(manifest.bytes_by_part.values())
    sizes = sorted(manifest.bytes_by_part.items(), key=lambda item: -item[1])
    parameters = manifest.source.parameters
    return tuple(
        Part(name=name, size_bytes=size, share=size / total, bits=8 * size / parameters) for name, size in sizes if size
    )


def layer_notes(report: Report) -> dict[str, tuple[str, ...]]:
    """Return each note about layers with the modules it is about: a module that all its layers share, or the layers."""
    layers_of = Counter(_parent(layer) for layer in report.layers)
    noted: dict[str, dict[str, list[str]]] = {}
    for layer in report.layers:
        for note in layer.notes:
            noted.setdefault(note, {}).setdefault(_parent(layer), []).append(layer.name)
    return {
        note: tuple(
            name
            for parent, names in parents.items()
            for name in ([parent] if parent and len(names) == layers_of[parent] else names)
        )
        for note, parents in noted.items()
    }


def _parent(layer: LayerReport) -> str:
    return layer.name.rpartition(".")[0]


def worst_layers(report: Report, count: int = WORST_LAYERS) -> tuple[LayerReport, ...]:
    """Return the layers with the largest output error (weight error, where there was no calibration)."""

    def error(layer: LayerReport) -> float:
        return layer.weight_error if layer.output_error is None else layer.output_error

    return tuple(sorted(report.layers, key=error, reverse=True)[:count])

"""How trainings went: the curves of trained artifacts in one CSV, and a picture and a table of it.

    python -m benchmarks.training_curves WORK/svid+light+train WORK/svid+light+train-short ...
    python -m benchmarks.training_curves         # writes the newest file's picture, and the table behind its marker

The table is that of docs/methods/onebit.md: a line a training, with the loss on windows held out before it, half way
and at its end.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernel_bench.results import write_table
from benchmarks.quality import RESULTS, without_folders
from benchmarks.quality_picture import INK
from benchmarks.quality_table import ROOT, read_lines
from onebit_core.artifact.reader import read_manifest, read_report
from onebit_core.errors import OnebitError
from onebit_core.evaluation.plots import learning_curves

MARKER = "<!-- training -->"
PAGE = ROOT / "docs" / "methods" / "onebit.md"
CODED = ("rtn", "gptq", "omniquant", "lut2", "residual")  # methods whose weights are codes, not signs
IMAGES = ROOT / "docs" / "images"


def lines_of(artifact: Path, device: str) -> list[dict[str, Any]]:
    """Return the lines of one trained artifact, one a look at the windows held out.

    Raises:
        ArtifactError: no artifact, or a damaged one.
        ValueError: it was not trained.
    """
    manifest, report = read_manifest(artifact), read_report(artifact)
    if not report.training:
        raise ValueError(f"{artifact}: not trained; name an artifact that `onebit train` or a training row made")
    training = without_folders(manifest.training)
    return [
        {
            "row": manifest.name,
            "method": manifest.method,
            "true_bits_linear": round(manifest.bits.linear_true, 4),
            **{key: entry.get(key, "") for key in ("step", "tokens", "held_out_kl", "kl", "hidden", "seconds")},
            "training": json.dumps(training, sort_keys=True),
            "reconstruction": json.dumps(manifest.reconstruction, sort_keys=True) if manifest.reconstruction else "",
            "device": device,
            "date": manifest.created,
            "versions": json.dumps(manifest.versions, sort_keys=True),
        }
        for entry in report.training
    ]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the page."""
    heading = ["training", "tokens", "signs or codes", "alpha", "seconds", "held-out KL before", "half way", "at end"]
    rows = [heading, ["---"] * len(heading)]
    for name, curve in _by_row(lines).items():
        settings = json.loads(curve[0]["training"])
        middle = min(curve, key=lambda line: abs(line["tokens"] - curve[-1]["tokens"] / 2))
        rows.append(
            [
                name,
                f"{curve[-1]['tokens']:,.0f}",
                _signs(curve[0]["method"], settings),
                f"{settings['alpha']:g}",
                f"{curve[-1]['seconds']:,.0f}",
                *(f"{line['held_out_kl']:.3f}" for line in (curve[0], middle, curve[-1])),
            ]
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _signs(method: str, settings: Mapping[str, Any]) -> str:
    """Say how signs were trained, or codes: these always by Adam on the numbers behind them."""
    if method in CODED:
        return f"adam {settings['latent_rate']:g}"
    if settings["sign_optimizer"] == "adam":
        return f"adam {settings['latent_rate']:g}, {settings['surrogate']}"
    return f"bop {settings['sign_rate']:g}" if settings["sign_rate"] else "stay"


def _by_row(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        curves.setdefault(line["row"], []).append(line)
    return curves


def with_table(text: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a page with another table behind its marker."""
    before, _, after = text.partition(f"{MARKER}\n")
    rest = after.split("\n")
    while rest and rest[0].startswith("|"):
        rest.pop(0)
    return f"{before}{MARKER}\n{table(lines)}\n" + "\n".join(rest)


def picture_of(file: Path) -> Path:
    """Return where the picture of a CSV belongs: among those of the docs, without the date."""
    return IMAGES / f"{file.stem.rpartition('_')[0]}.svg"


def newest_file() -> Path:
    """Return the newest committed measurement."""
    return max(RESULTS.glob("training_*.csv"), key=lambda file: file.stem.rpartition("_")[2])


def publish(file: Path) -> None:
    """Write the picture and the table of a CSV."""
    lines = read_lines(file)
    picture = learning_curves(_by_row(lines)).replace("currentColor", INK)  # an image has no page's colour
    picture_of(file).write_text(picture, encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), lines), encoding="utf-8")


def main() -> int:
    """Collect curves, if artifacts are named, and publish them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifacts", nargs="*", type=Path, metavar="ARTIFACT", help="trained artifacts")
    parser.add_argument("--device", default="cpu", help="what they were trained on, in words")
    parser.add_argument("--out", type=Path, default=None, help="CSV file; default: the newest one of the results")
    options = parser.parse_args()
    file: Path = options.out or newest_file()
    if options.artifacts:
        try:
            write_table(file, [line for artifact in options.artifacts for line in lines_of(artifact, options.device)])
        except (OnebitError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    publish(file)
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

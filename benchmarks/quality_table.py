"""What quality.py wrote: the lines of its CSV, and tables of them: all rows, the README's best ones, each method's.

python -m benchmarks.quality_table          # writes the newest file's tables behind the markers in README and docs
"""

import csv
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- quality -->"
NOISE = 1000.0
"""Times the original's perplexity, from which on a model says nothing."""

NOTHING = "Not measured yet: `make quality`."


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a CSV back, numbers as numbers."""
    with file.open(newline="", encoding="utf-8") as stream:
        return [{key: _number(value) for key, value in line.items()} for line in csv.DictReader(stream)]


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return a table: one line an artifact, with perplexity, KL and top-1 of every text."""
    datasets = list(dict.fromkeys(line["dataset"] for line in lines))
    heading = ["method", "true bits (advertised)", "whole model"]
    for dataset in datasets:
        one = next(line for line in lines if line["dataset"] == dataset)
        heading += [f"ppl {dataset} (original {one['ppl_original']:.4g})", f"KL {dataset}", f"top-1 {dataset}"]
    table = [heading, ["---"] * len(heading)]
    for name in dict.fromkeys(line["row"] for line in lines):
        of_row = {line["dataset"]: line for line in lines if line["row"] == name}
        one = next(iter(of_row.values()))
        cells = [
            name,
            f"{one['true_bits_linear']:.2f} ({one['nominal_bits_linear']:.2g})",
            f"{one['whole_model_bits']:.2f}",
        ]
        for dataset in datasets:
            line = of_row.get(dataset)
            cells += ["", "", ""] if line is None else _cells(line)
        table.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def _cells(line: Mapping[str, Any]) -> list[str]:
    """Return perplexity with error and ratio, KL with error, and agreement."""
    return [
        f"{line['ppl']:.4g} ± {line['ppl_se']:.2g} ({line['ratio']:.3g}x)",
        f"{line['kl_mean']:.3g} ± {line['kl_se']:.1g}",
        f"{line['top1']:.1%}",
    ]


def frontier(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines of the rows worth choosing, by bits, as the table shows them.

    No other row has as few bits and as little perplexity on every text, and on no text is it mere noise.
    """
    costs: dict[str, tuple[float, ...]] = {}
    for line in lines:
        costs[line["row"]] = (*costs.get(line["row"], (round(line["true_bits_linear"], 2),)), line["ratio"])
    costs = {row: cost for row, cost in costs.items() if max(cost[1:]) < NOISE}
    best = [row for row, cost in costs.items() if not any(_beats(other, cost) for other in costs.values())]
    return sorted((line for line in lines if line["row"] in best), key=lambda line: costs[line["row"]])


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a row is nowhere worse and somewhere better; a row without one of the texts is not compared."""
    return one != other and len(one) == len(other) and all(mine <= its for mine, its in zip(one, other, strict=True))


def newest_file() -> Path:
    """Return the newest committed measurement."""
    return max((ROOT / "benchmarks" / "results").glob("quality_*.csv"), key=lambda file: file.stem.rpartition("_")[2])


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the pages that have a marker, each with the text it should have."""
    lines = read_lines(newest_file())
    tables = {ROOT / "README.md": frontier(lines), ROOT / "docs" / "quality.md": lines}
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        tables[page] = [line for line in lines if line["method"] == page.stem]
    for page, of_page in tables.items():
        text = page.read_text(encoding="utf-8")
        if MARKER in text:
            yield page, with_table(text, markdown(of_page) if of_page else NOTHING)


def with_table(text: str, table: str) -> str:
    """Return a page with another table, or sentence, behind its marker."""
    return re.sub(rf"(?<={MARKER}\n)(?:\|[^\n]*\n|{re.escape(NOTHING)}\n)*", lambda _: f"{table}\n", text)


def main() -> int:
    """Bring the pages up to date."""
    for page, text in pages():
        page.write_text(text, encoding="utf-8")
        print(page.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What quality.py wrote: the lines of its CSV, the README's table of them, and that of each method's page.

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
    """Return the README's table: one line an artifact, with perplexity, KL and top-1 of every text."""
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


def newest_file() -> Path:
    """Return the newest committed measurement."""
    return max((ROOT / "benchmarks" / "results").glob("quality_*.csv"), key=lambda file: file.stem.rpartition("_")[2])


def pages() -> Iterator[tuple[Path, str]]:
    """Yield the pages that have a marker, each with the text it should have."""
    lines = read_lines(newest_file())
    for page in (ROOT / "README.md", *sorted((ROOT / "docs" / "methods").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if MARKER in text:
            of_page = lines if page.name == "README.md" else [line for line in lines if line["method"] == page.stem]
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

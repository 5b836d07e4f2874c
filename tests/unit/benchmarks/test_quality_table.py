"""The README's table holds the rows worth choosing, and only those."""

import pytest

from benchmarks.quality_table import frontier


def lines_of(row, bits, *ratios):
    """Return a line a text."""
    return [
        {"row": row, "true_bits_linear": bits, "ratio": ratio, "dataset": number} for number, ratio in enumerate(ratios)
    ]


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ({"b": (2.0, 3.0, 3.0), "a": (1.0, 9.0, 9.0)}, ["a", "b"]),
        ({"a": (1.0, 9.0, 9.0), "worse": (1.0, 9.0, 9.5), "larger": (1.5, 9.0, 9.0)}, ["a"]),
        ({"a": (1.002, 9.0, 9.0), "worse": (1.0, 9.5, 9.5)}, ["a"]),
        ({"a": (1.0, 9.0, 9.0), "better on one text": (1.5, 9.5, 8.0)}, ["a", "better on one text"]),
        ({"a": (1.0, 9.0, 9.0), "as good": (1.0, 9.0, 9.0)}, ["a", "as good"]),
        ({"a": (1.0, 9.0, 9.0), "noise": (0.5, 3000.0, 900.0)}, ["a"]),
        ({"a": (1.0, 9.0, 9.0), "one text only": (2.0, 10.0)}, ["a", "one text only"]),
    ],
)
def test_a_row_stays_unless_another_is_nowhere_worse_and_somewhere_better(rows, best):
    """In bits and on every text; by bits, without noise."""
    lines = [line for row, numbers in rows.items() for line in lines_of(row, *numbers)]
    kept = [line["row"] for line in frontier(lines)]
    assert list(dict.fromkeys(kept)) == best
    assert len(kept) == sum(len(rows[row]) - 1 for row in best)

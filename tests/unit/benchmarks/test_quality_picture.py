"""Bits against quality: who stands where, what the lines join, and letters that can be read."""

import csv
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks.quality_picture import (
    HIGHEST,
    Mark,
    description_of,
    draw,
    frontier,
    kind_of,
    panels_of,
    picture_of,
    place_labels,
)


def line(row: str, bits: float = 2.0, ratio: float = 3.0, **other: Any) -> dict[str, Any]:
    values = {"dataset": "news", "fingerprint": "aa", "windows": 10.0, "method": "gptq", "reconstruction": ""}
    return {"row": row, "true_bits_linear": bits, "ratio": ratio, **values, **other}


def mark(name: str, bits: float, ratio: float) -> Mark:
    return Mark(name=name, bits=bits, ratio=ratio, kind="published")


def write(file: Path, *lines: dict[str, Any]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return file


def test_ours_are_our_methods_and_whatever_was_trained_or_planned() -> None:
    """Files from before there were plans, or reconstruction, have no such column."""
    assert kind_of(line("gptq-2b")) == "published"
    assert kind_of({"method": "rtn"}) == "published"
    assert kind_of(line("lut2", method="lut2")) == "ours"
    assert kind_of(line("gptq-2b+light", reconstruction='{"preset": "light"}')) == "ours"
    assert kind_of(line("gptq-2.5b-spread", allocation=2.5)) == "ours"
    assert kind_of(line("gptq-2b", allocation="")) == "published"
    assert kind_of(line("svid+full+train", reconstruction='{"preset": "full"}', training='{"steps": 1}')) == "trained"


def test_the_frontier_leaves_out_what_another_beats_in_both() -> None:
    """Of equal bits the better one stays, and nothing that costs more bits for nothing."""
    marks = [mark("a", 1, 9), mark("b", 2, 4), mark("c", 2, 5), mark("d", 3, 4), mark("e", 4, 1.1), mark("f", 3, 20)]

    assert [one.name for one in frontier(marks)] == ["a", "b", "e"]
    assert frontier([]) == []


def test_every_text_has_a_panel_and_a_later_file_replaces_rows() -> None:
    """The same name with other tokens is another text, not mixed with the first."""
    lines = [
        line("a", ratio=3.0),
        line("b"),
        line("a", dataset="wiki", fingerprint="bb"),
        line("a", ratio=2.0),
        line("a", fingerprint="cc"),
    ]
    panels = panels_of(lines)

    assert list(panels) == ["news, 10 windows", "wiki, 10 windows", "news, 10 windows, other tokens"]
    assert [(one.name, one.ratio) for one in panels["news, 10 windows"]] == [("a", 2.0), ("b", 3.0)]


def test_what_is_beyond_the_axis_says_how_bad_it_is() -> None:
    """1000 times is on the axis, more is not."""
    assert mark("a", 1, HIGHEST).label == "a"
    assert mark("svid", 1, 141_000).label == "svid 1e5x"


def test_labels_keep_apart_where_there_is_room() -> None:
    """Twelve marks in a cluster: no label covers another label or a mark, none is outside or far away."""
    marks = [(200.0 + 15 * (index % 4), 150.0 + 14 * (index // 4)) for index in range(12)]
    sizes = [(50.0, 9.0)] * len(marks)

    corners = place_labels(marks, sizes, (0, 0, 420, 320))

    boxes = [(x, y, x + 50, y + 9) for x, y in corners]
    for index, (left, bottom, right, top) in enumerate(boxes):
        assert (left >= 0, bottom >= 0, right <= 420, top <= 320) == (True,) * 4
        assert not [x for x, y in marks if left < x < right and bottom < y < top]
        for other in boxes[index + 1 :]:
            shared_width = min(right, other[2]) - max(left, other[0])
            assert shared_width <= 0 or min(top, other[3]) - max(bottom, other[1]) <= 0
        x, y = marks[index]
        assert max(left - x, x - right, bottom - y, y - top) < 60


def test_the_picture_names_its_files_and_is_the_same_every_time(tmp_path: Path) -> None:
    """Valid XML without a background; drawn again, the same bytes; of a changed file, another description."""
    pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")
    first = write(
        tmp_path / "quality_tiny_2026-01-02.csv", line("a$x$", 1, 50_000), line("<b>"), line("c", method="lut2")
    )
    second = write(tmp_path / "quality_tiny_2026-01-03.csv", line("d", dataset="wiki", fingerprint="bb"))
    out = picture_of(first)
    assert out.name == "quality_tiny.svg"

    draw([first, second], out)
    before = out.read_bytes()
    draw([first, second], out)

    assert out.read_bytes() == before
    root = ET.fromstring(before)
    assert description_of([first, second]) in "".join(root.itertext())
    assert not [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if "fill: #fff" in str(rect.attrib)]
    write(first, line("a"))
    assert description_of([first, second]) not in before.decode()

"""Text from every form of file, whole and from any place on."""

import gzip
import json
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from onebit_core.calibration import documents, sources
from onebit_core.calibration.sources import join_source, open_source, read_text, source_files, split_source
from onebit_core.errors import CalibrationError

TEXTS = [f"document {number}: " + "äöü€ line\n" * (number % 5) for number in range(40)]


@pytest.fixture(scope="module")
def pyarrow():
    return pytest.importorskip("pyarrow", reason="needs the extra onebit[datasets]")


def write_parquet(pyarrow, path, columns, rows_per_group=7):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_per_group)
    return path


def write_arrow(pyarrow, path, columns, *, form="stream", rows_per_batch=7):
    table = pyarrow.table(columns)
    opened = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with opened(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path


def lines(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.fixture(scope="module")
def forms(pyarrow, tmp_path_factory):
    """The same documents in every form; returns form to source."""
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("forms")
    (folder / "lines.jsonl").write_text(lines(TEXTS))
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS).encode()))
    (folder / "c4.json.gz").write_bytes(gzip.compress(lines(TEXTS).encode()))
    (folder / "array.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    (folder / "strings.json").write_text(json.dumps(TEXTS))
    write_parquet(pyarrow, folder / "table.parquet", {"id": list(range(40)), "text": TEXTS})
    write_parquet(pyarrow, folder / "other.parquet", {"text": ["x"] * 40, "body": TEXTS})
    write_arrow(pyarrow, folder / "stream.arrow", {"text": TEXTS})
    write_arrow(pyarrow, folder / "file.arrow", {"text": TEXTS}, form="file")
    shards = folder / "shards"
    shards.mkdir()
    for index in range(4):
        write_parquet(pyarrow, shards / f"part-{index}.parquet", {"text": TEXTS[10 * index : 10 * index + 10]})
    (shards / "README.md").write_text("not a document")
    saved = folder / "saved"
    saved.mkdir()
    write_arrow(pyarrow, saved / "data-00000-of-00002.arrow", {"text": TEXTS[:25]})
    write_arrow(pyarrow, saved / "data-00001-of-00002.arrow", {"text": TEXTS[25:]})
    write_arrow(pyarrow, saved / "cache-1234.arrow", {"text": ["no part of it"]})
    names = [{"filename": f"data-0000{index}-of-00002.arrow"} for index in range(2)]
    (saved / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "1234"}))
    (saved / "dataset_info.json").write_text("{}")
    named = {path.name: str(path) for path in folder.iterdir()}
    return named | {"other.parquet": f"{folder / 'other.parquet'}#body"}


FORMS = [
    "lines.jsonl", "lines.jsonl.gz", "c4.json.gz", "array.json", "strings.json", "table.parquet", "other.parquet",
    "stream.arrow", "file.arrow", "shards", "saved",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_same_documents_in_every_form_are_the_same_text(forms, form):
    """Joined by blank lines."""
    assert read_text(forms[form]) == "\n\n".join(TEXTS)


@pytest.mark.parametrize("form", FORMS)
def test_parts_give_every_document_once(forms, form):
    """Wherever a source is divided, each document belongs to exactly one part, in order."""
    with open_source(forms[form]) as opened:
        assert opened.size >= len(TEXTS)
        for count in (2, 3, 13):
            borders = [opened.size * part // count for part in range(count + 1)]
            parts = [list(opened.read(first, last)) for first, last in reversed(list(pairwise(borders)))]
            parts.reverse()
            read = [text.removeprefix("\n\n") for part in parts for text in part]
            assert read == TEXTS


def test_what_datasets_saves_is_read(tmp_path):
    """save_to_disk of the library itself, sharded; a folder of splits asks for one."""
    datasets = pytest.importorskip("datasets", reason="the library is only needed to write the sample")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": list(range(40))})
    rows.save_to_disk(tmp_path / "rows", num_shards=3)
    assert read_text(str(tmp_path / "rows")) == "\n\n".join(TEXTS)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    with pytest.raises(CalibrationError, match=r"several splits \(test, train\); name one"):
        read_text(str(tmp_path / "splits"))
    assert read_text(str(tmp_path / "splits" / "test")) == "\n\n".join(TEXTS[:3])


def test_rows_without_text_are_passed_over(pyarrow, tmp_path):
    """A null is no document; text by dictionary and large strings are text."""
    import pyarrow.parquet

    plain = pyarrow.array(["a", None, "b", "a"])
    for name, column in (("d", plain.dictionary_encode()), ("l", plain.cast(pyarrow.large_string()))):
        write_parquet(pyarrow, tmp_path / f"{name}.parquet", {"text": column})
        write_arrow(pyarrow, tmp_path / f"{name}.arrow", {"text": column})
        assert read_text(str(tmp_path / f"{name}.parquet")) == "a\n\nb\n\na"
        assert read_text(str(tmp_path / f"{name}.arrow")) == "a\n\nb\n\na"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_wrong_column_is_answered_with_the_right_ones(pyarrow, tmp_path, suffix):
    """Missing, of numbers, or there twice."""
    import pyarrow.parquet

    write = write_parquet if suffix == "parquet" else write_arrow
    path = write(pyarrow, tmp_path / f"t.{suffix}", {"id": [1], "question": ["a"], "answer": ["b"]})
    for column, source in (("text", str(path)), ("id", f"{path}#id"), ("none", f"{path}#none")):
        with pytest.raises(CalibrationError) as caught:
            read_text(source)
        assert f"'{column}'; columns of text: 'question', 'answer'; others: 'id'; name one as" in str(caught.value)
    assert read_text(f"{path}#answer") == "b"


def test_a_wrong_field_is_answered_with_the_right_ones(tmp_path):
    """The same for JSON; text files have none."""
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a"}')
    (tmp_path / "a.json").write_text('[{"question": "q"}, 3]')
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CalibrationError, match=r"a\.jsonl: line 1 .*\"text\" field; its fields: 'question', 'answer'"):
        read_text(str(tmp_path / "a.jsonl"))
    assert read_text(f"{tmp_path}/a.jsonl#answer") == "a"
    with pytest.raises(CalibrationError, match=r"a\.json: item 1 is not an object"):
        read_text(f"{tmp_path}/a.json#question")
    with pytest.raises(CalibrationError, match=r"no column 'x'; leave out #x"):
        read_text(f"{tmp_path}/a.txt#x")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("x.parquet", b"PAR1 and no more", "not a readable table"),
        ("x.arrow", b"ARROW1", "not a readable table"),
        ("x.arrow", b"", "not a readable table"),
        ("x.jsonl.gz", b"no gzip", "cannot be read"),
        ("x.txt.gz", gzip.compress(b"words " * 1000, mtime=0)[:-20], "cannot be read"),
        ("x.json", b'["a", ', "not a JSON array"),
        ("x.json", b'["a" "b"]', "expected ','"),
        ("x.json", b'["a"] "b"', "something stands behind the array"),
        ("x.json", b'["a", "\\ud800"]', "item 1 holds half a character"),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1 holds half a character"),
        ("x.json", b'["a", 1]', "item 1 is not an object"),
        ("x.json", b"[" * 100_000, "not a JSON array"),
        ("x.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("x.txt", b"a\xff", "not UTF-8"),
        ("x.txt", b"a\xe2\x82", "not UTF-8"),
        ("x.json", b"[]", "empty"),
    ],
)
def test_damaged_files_are_one_sentence(pyarrow, tmp_path, name, content, part):
    """The file, and what is wrong."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=part) as caught:
        read_text(str(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "path", "column"),
    [
        ("a.parquet", "a.parquet", None),
        ("a.parquet#body", "a.parquet", "body"),
        ("a#b.parquet#body", "a#b.parquet", "body"),
        ("a#b.txt#", "a#b.txt", None),
        ("c#/x.txt", "c#/x.txt", None),
        ("builtin:python", "builtin:python", None),
    ],
)
def test_a_column_is_what_stands_behind_the_last_mark(source, path, column):
    """Decided by the name alone, and put together again to the same."""
    assert split_source(source) == (path, column)
    assert join_source(path, column) == source


def test_a_name_with_a_mark_gets_another(tmp_path):
    """a#b.txt is column b.txt of a, and the error says how to mean the file."""
    (tmp_path / "a#b.txt").write_text("words")
    with pytest.raises(CalibrationError, match="add another at the end"):
        read_text(f"{tmp_path}/a#b.txt")
    assert read_text(f"{tmp_path}/a#b.txt#") == "words"
    assert join_source(f"{tmp_path}/a#b.txt", None) == f"{tmp_path}/a#b.txt#"


def test_a_saved_state_cannot_name_files_elsewhere(pyarrow, tmp_path):
    """Only the names in its own folder count."""
    write_arrow(pyarrow, tmp_path / "secret.arrow", {"text": ["secret"]})
    saved = tmp_path / "saved"
    saved.mkdir()
    write_arrow(pyarrow, saved / "x.arrow", {"text": ["open"]})
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow")):
        (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        assert source_files(str(saved)) == [saved / "secret.arrow"]
        with pytest.raises(CalibrationError, match="no such file"):
            read_text(str(saved))
    for broken in ("[]", "{", '{"_data_files": [3]}'):
        (saved / "state.json").write_text(broken)
        with pytest.raises(CalibrationError, match=r"state\.json: lists no files"):
            read_text(str(saved))


@pytest.mark.parametrize("source", ["self:", "self:#text"])
def test_only_calibration_may_ask_the_model_to_write(source):
    """As a text to read it does not exist."""
    with pytest.raises(CalibrationError, match="for calibration only"):
        read_text(source)


def test_a_text_too_large_for_one_is_refused(tmp_path, monkeypatch):
    """Before memory runs out."""
    monkeypatch.setattr(sources, "LARGEST_TEXT_CHARACTERS", 100)
    (tmp_path / "x.jsonl").write_text(lines(TEXTS))
    with pytest.raises(CalibrationError, match="give a part of it"):
        read_text(str(tmp_path / "x.jsonl"))


def test_long_lines_are_read_in_pieces(tmp_path, monkeypatch):
    """The pieces of a text file are its text, also where a character or CR LF lies across two of them."""
    text = "ä€😀\r\n" * 50 + "end"
    (tmp_path / "x.txt").write_bytes(text.encode())
    monkeypatch.setattr(documents, "LONGEST_PIECE_BYTES", 3)
    assert read_text(str(tmp_path / "x.txt")) == text.replace("\r\n", "\n")
    with open_source(str(tmp_path / "x.txt")) as opened:
        for first in range(40):
            rest = "".join(opened.read(first, None))
            assert text.replace("\r\n", "\n").endswith(rest)
            assert len(rest) > 100


def test_a_folder_may_hold_more_files_than_a_process_may_open(tmp_path):
    """Files are open one at a time."""
    for number in range(200):
        (tmp_path / f"{number:04}.txt").write_text(f"text {number}")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 40, limits[1]))
    try:
        with open_source(str(tmp_path)) as opened:
            assert opened.size > 200
            assert sum(text.count("text") for text in opened.read(0, opened.size)) == 200
        assert read_text(str(tmp_path)).endswith("text 199")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_reading_without_pyarrow_names_the_extra(tmp_path):
    """In a process where it cannot be imported."""
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from onebit_core.calibration.sources import read_text\n"
        f"read_text({str(tmp_path / 'x.parquet')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "CalibrationError" in done.stderr
    assert "pip install 'onebit[datasets]'" in done.stderr

"""Windows of a text: the right tokens, a fingerprint of them, and a clear word about texts that cannot be used."""

import hashlib
import struct
from pathlib import Path

import pytest

from onebit_core.errors import EvaluationError
from onebit_core.evaluation.windows import read_windows
from tests.support.tiny_model import byte_tokenizer


def write(folder: Path, content: bytes) -> str:
    file = folder / "text.txt"
    file.write_bytes(content)
    return str(file)


def test_windows_are_the_text_in_order_without_overlap(tmp_path: Path) -> None:
    """With a byte tokenizer, ten bytes make two windows of four; the rest is not used."""
    windows = read_windows("t", write(tmp_path, b"abcdefghij"), byte_tokenizer(), window_tokens=4)

    assert windows.tokens_WT.tolist() == [list(b"abcd"), list(b"efgh")]


def test_fingerprint_is_of_the_used_tokens_as_int32(tmp_path: Path) -> None:
    """Anyone can compute it again: sha256 over little-endian int32 ids."""
    windows = read_windows("t", write(tmp_path, b"abcdefghij"), byte_tokenizer(), window_tokens=4)

    assert windows.fingerprint == hashlib.sha256(struct.pack("<8i", *b"abcdefgh")).hexdigest()


def test_line_ends_do_not_change_the_text(tmp_path: Path) -> None:
    """A file saved with CR LF evaluates like the same file saved with LF."""
    dos = read_windows("t", write(tmp_path, b"ab\r\ncd\r\nef"), byte_tokenizer(), window_tokens=4)
    unix = read_windows("t", write(tmp_path, b"ab\ncd\nef"), byte_tokenizer(), window_tokens=4)

    assert dos.fingerprint == unix.fingerprint


def test_a_short_text_is_refused_with_both_numbers(tmp_path: Path) -> None:
    """Asking for more windows than there are is an error, never a silently smaller evaluation."""
    with pytest.raises(EvaluationError, match=r"text t: .*10 tokens, too few for 3 windows of 4 tokens"):
        read_windows("t", write(tmp_path, b"abcdefghij"), byte_tokenizer(), window_tokens=4, windows=3)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"PK\x03\x04\x00\x00", b""])
def test_what_is_not_text_is_refused(tmp_path: Path, content: bytes) -> None:
    """Bytes that are not UTF-8, a zero byte, or nothing at all."""
    with pytest.raises(EvaluationError, match="text t: "):
        read_windows("t", write(tmp_path, content), byte_tokenizer(), window_tokens=2)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The message says which file."""
    with pytest.raises(EvaluationError, match=r"nowhere\.txt"):
        read_windows("t", str(tmp_path / "nowhere.txt"), byte_tokenizer())


@pytest.mark.parametrize(("window_tokens", "windows"), [(1, None), (4, 0)])
def test_impossible_sizes_are_refused(tmp_path: Path, window_tokens: int, windows: int | None) -> None:
    """A window of one token predicts nothing; no windows measure nothing."""
    with pytest.raises(EvaluationError, match="at least"):
        read_windows("t", write(tmp_path, b"abcdefgh"), byte_tokenizer(), window_tokens=window_tokens, windows=windows)

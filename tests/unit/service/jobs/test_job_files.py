"""What lies in a job's folder: the lock, the count of crashes, the log; and the limits its artifact is held to."""

import asyncio
import math
import os
import subprocess
import sys
import time

import pytest

from service.errors import BadRequest
from service.jobs import attempts
from service.jobs.fence import LOCK_FILE, fenced, is_busy, name_holder
from service.jobs.idempotency import read_key
from service.jobs.limits import broken_by_loss, broken_by_size
from service.jobs.log_file import read_log
from service.jobs.types import Limits


def test_crashes_in_a_row_at_one_place_count(tmp_path):
    """Getting on between two crashes starts the count anew, and so does an end of the job."""
    assert [attempts.begin(tmp_path, "block 1") for _ in range(4)] == [0, 1, 2, 3]
    assert [attempts.begin(tmp_path, "block 2") for _ in range(2)] == [0, 1]
    attempts.forget(tmp_path)
    assert attempts.begin(tmp_path, "block 2") == 0


def test_an_orderly_stop_is_no_crash(tmp_path):
    """A server that is restarted every hour never fails a job; the crashes before still count."""
    for crashes in (0, 0, 0):
        assert attempts.begin(tmp_path, "block 1") == crashes
        attempts.end(tmp_path)
    attempts.begin(tmp_path, "block 1")
    assert attempts.begin(tmp_path, "block 1") == 1
    attempts.end(tmp_path)
    assert attempts.begin(tmp_path, "block 1") == 1


def test_a_damaged_count_counts_for_nothing(tmp_path):
    """A job must not fail because a note about it is unreadable."""
    for text in ("", "[]", '{"crashes": 2, "other": 1}', "\x00"):
        (tmp_path / attempts.ATTEMPTS_FILE).write_text(text)
        assert attempts.begin(tmp_path, "block 1") == 0


def start_holder(folder, argument):
    """A process that holds the folder's lock; its command line has the argument."""

    async def start():
        async with fenced(folder) as lock:
            process = subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(60)", argument],
                pass_fds=(lock,),
                start_new_session=True,
            )
            name_holder(lock, process.pid)
        return process

    return asyncio.run(start())


def test_a_command_of_this_machine_makes_way_for_the_next(tmp_path):
    """Whoever the database gave the job to ends the command that still runs for another."""
    holder = start_holder(tmp_path, str(tmp_path))
    assert is_busy(tmp_path)

    async def take():
        async with asyncio.timeout(20), fenced(tmp_path):
            assert holder.wait() == -9

    asyncio.run(take())
    assert not is_busy(tmp_path)


def test_a_stranger_with_the_number_of_the_holder_is_left_alone(tmp_path):
    """A process whose command line does not name the folder is not killed; the lock is waited for."""
    holder = start_holder(tmp_path, "stranger")

    async def take():
        async with asyncio.timeout(1.0), fenced(tmp_path):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(take())
    assert holder.poll() is None
    holder.kill()
    holder.wait()
    asyncio.run(take())


def test_a_cancelled_wait_keeps_no_lock(tmp_path):
    """The folder is free once the holder is gone, though somebody waited for it."""
    holder = start_holder(tmp_path, "stranger")

    async def give_up():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), fenced(tmp_path):
                pass

    asyncio.run(give_up())
    holder.kill()
    holder.wait()
    assert not is_busy(tmp_path)
    assert (tmp_path / LOCK_FILE).exists()


def test_the_log_is_read_in_parts(tmp_path):
    """From an offset on without a gap, or the last lines; the answer says where to go on."""
    assert read_log(tmp_path, tail=None, offset=None, limit=10).content == b""
    (tmp_path / "log").write_bytes(b"one\ntwo\nthree\n")
    assert read_log(tmp_path, tail=2, offset=None, limit=100).content == b"two\nthree\n"
    assert read_log(tmp_path, tail=None, offset=None, limit=6).content == b"three\n"
    read, offset = b"", 0
    while (part := read_log(tmp_path, tail=None, offset=offset, limit=5)).content:
        read, offset = read + part.content, part.next_offset
    assert (read, part.size) == (b"one\ntwo\nthree\n", 14)
    assert read_log(tmp_path, tail=None, offset=10**15, limit=5).next_offset == 14
    with pytest.raises(BadRequest, match="exclude"):
        read_log(tmp_path, tail=1, offset=0, limit=5)


def test_no_link_and_no_pipe_is_read_as_a_log(tmp_path):
    """What stands in the log's place is not followed and not waited for."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "log").symlink_to(tmp_path / "secret")
    assert read_log(tmp_path, tail=None, offset=None, limit=100).content == b""
    (tmp_path / "log").unlink()
    os.mkfifo(tmp_path / "log")
    began = time.monotonic()
    assert read_log(tmp_path, tail=None, offset=0, limit=100).content == b""
    assert time.monotonic() - began < 5


def result(text, kl, top1):
    return {"dataset": text, "kl_mean": kl, "top1_agreement": top1}


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        (Limits(), None),
        (Limits(max_kl=0.3, min_top1=0.8), None),
        (Limits(max_kl=0.2), "its mean KL divergence on hard is 0.3 nats; max_kl is 0.2"),
        (Limits(min_top1=0.85), "its top-1 agreement on hard is 0.8; min_top1 is 0.85"),
    ],
)
def test_every_text_must_keep_to_the_limits(limits, broken):
    """An easy text does not make up for a hard one; a limit that is just met is met."""
    assert broken_by_loss(limits, [result("easy", 0.01, 0.99), result("hard", 0.3, 0.8)]) == broken


def test_what_is_not_a_number_keeps_to_no_limit():
    """NaN compares false with everything, which must not pass for good."""
    assert "nan" in (broken_by_loss(Limits(max_kl=1.0), [result("a", math.nan, 1.0)]) or "")
    assert "nan" in (broken_by_loss(Limits(min_top1=0.1), [result("a", 0.0, math.nan)]) or "")


def test_bits_are_those_of_the_whole_model():
    """Just met is met."""
    assert broken_by_size(Limits(max_bits=4.0), 4.0) is None
    assert broken_by_size(Limits(), 99.0) is None
    assert "4.001 bits" in (broken_by_size(Limits(max_bits=4.0), 4.001) or "")


def test_a_key_is_read_from_its_header():
    """The same body in another order is the same; what is no key is refused and not repeated."""
    first = read_key(["k1"], {"a": 1, "b": 2.0})
    assert first == read_key(["k1"], {"b": 2.0, "a": 1})
    assert first.request_sha256 != read_key(["k1"], {"a": 1, "b": 2.5}).request_sha256
    assert first.job_id != read_key(["k2"], {}).job_id
    assert read_key([], {}) is None
    for values in ([""], ["a b"], ["a\tb"], ["x" * 256], ["é"], ["k1", "k1"]):
        with pytest.raises(BadRequest, match="visible ASCII") as refused:
            read_key(values, {})
        assert refused.value.param == "Idempotency-Key"

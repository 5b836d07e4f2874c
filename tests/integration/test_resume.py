"""A run that was stopped continues after the last finished block, and ends with the same bytes."""

import resource

import pytest

from onebit_core.artifact.reader import read_manifest
from onebit_core.errors import ArtifactError, Cancelled, ConfigError, CorruptArtifact
from onebit_core.pipeline.run import quantize_model
from onebit_core.progress import CancelToken, ProgressEvent, Watch
from tests.support.quantized import quantize_tiny, tiny_config
from tests.support.tiny_model import save_tiny_model


class StopAfter:
    """A watch that cancels once a number of blocks is done, and counts blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks, self.seen, self.token = blocks, [], CancelToken()

    def __call__(self, event: ProgressEvent) -> None:
        if event.stage == "quantize" and event.done:
            self.seen.append(event.done)
            if event.done == self.blocks:
                self.token.cancel()

    def watch(self) -> Watch:
        return Watch(sink=self, cancel=self.token)


@pytest.mark.parametrize("preset", ["off", "light", "full"])
def test_a_resumed_run_gives_the_same_bytes(tmp_path, preset):
    """Stopped after block 2 of 3 and continued: equal to the undisturbed run, with blocks that were trained too."""
    model = save_tiny_model(tmp_path / "model", num_layers=3)
    changes = {"reconstruction": {"preset": preset}}
    undisturbed = quantize_tiny(model, tmp_path / "undisturbed", "pb_llm", **changes)
    config, work, out = tiny_config(model, "pb_llm", **changes), tmp_path / "work", tmp_path / "resumed"
    with pytest.raises(Cancelled):
        quantize_model(config, out, watch=StopAfter(2).watch(), work=work)
    assert not out.exists()
    assert sorted(file.name for file in work.iterdir()) == [
        "block_0000.safetensors", "block_0001.safetensors", "run.json",
    ]  # fmt: skip
    before = {file: file.stat().st_mtime_ns for file in work.glob("block_*")}
    quantize_model(config, out, work=work)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert read_manifest(out).sha256 == read_manifest(undisturbed).sha256


def test_a_cancelled_run_leaves_no_artifact(tiny_llama, tmp_path):
    """Neither the folder nor a temporary one."""
    with pytest.raises(Cancelled):
        quantize_model(tiny_config(tiny_llama, "gptq"), tmp_path / "out", watch=StopAfter(1).watch())
    assert list(tmp_path.iterdir()) == []


def test_a_work_folder_of_another_run_is_refused(tiny_llama, tmp_path):
    """Other settings must not continue these blocks."""
    quantize_model(tiny_config(tiny_llama, "rtn"), tmp_path / "a", work=tmp_path / "work")
    other = tiny_config(tiny_llama, "rtn", settings={"bits": 3, "group_size": 32})
    with pytest.raises(ConfigError, match="blocks of another run"):
        quantize_model(other, tmp_path / "b", work=tmp_path / "work")


def test_a_calibration_text_that_changed_is_another_run(tiny_llama, tmp_path):
    """The same path may hold other text now; its blocks must not be mixed with the old ones."""
    text = tmp_path / "text.txt"
    config = tiny_config(tiny_llama, "gptq", calibration={"samples": 2, "tokens": 32, "text": [str(text)]})
    text.write_text("one and the same text " * 20)
    quantize_model(config, tmp_path / "a", work=tmp_path / "work")
    text.write_text("quite another text " * 20)
    with pytest.raises(ConfigError, match="calibration text"):
        quantize_model(config, tmp_path / "b", work=tmp_path / "work")


def test_a_work_folder_that_cannot_be_used_is_refused(tiny_llama, tmp_path):
    """A file in its place, or a damaged run.json."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "run.json").write_text("")
    for name in ("file", "folder"):
        with pytest.raises(ConfigError, match=f"{name}: cannot hold finished blocks .* --work-dir"):
            quantize_model(tiny_config(tiny_llama, "rtn"), tmp_path / "a", work=tmp_path / name)


def test_a_cancellation_after_the_artifact_is_there_comes_too_late(tiny_llama, tmp_path):
    """A complete artifact is a success, not a cancelled run."""
    token = CancelToken()

    def sink(event: ProgressEvent) -> None:
        if (event.stage, event.done) == ("write", 1):
            token.cancel()

    out = quantize_model(tiny_config(tiny_llama, "rtn"), tmp_path / "out", watch=Watch(sink=sink, cancel=token))
    assert read_manifest(out).method == "rtn"


@pytest.mark.parametrize("work", ["work", None])
def test_a_full_disk_is_one_sentence(tiny_llama, tmp_path, work):
    """Files end at 4 kB here: neither a traceback nor anything half-written."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(ArtifactError, match="cannot be written"):
            quantize_model(tiny_config(tiny_llama, "rtn"), tmp_path / "out", work=work and tmp_path / work)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [file.name for file in tmp_path.rglob("*")] == (["work", "run.json"] if work else [])


def test_a_damaged_block_is_named(tiny_llama, tmp_path):
    """A truncated block file is an error with the remedy, not a wrong model."""
    work = tmp_path / "work"
    quantize_model(tiny_config(tiny_llama, "rtn"), tmp_path / "a", work=work)
    file = work / "block_0001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptArtifact, match=r"block_0001.safetensors: damaged .* remove it"):
        quantize_model(tiny_config(tiny_llama, "rtn"), tmp_path / "b", work=work)

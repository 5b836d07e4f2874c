"""Calibration on text that the model writes itself: kept in the work folder, mixed with files, and as a command."""

import json
from collections import namedtuple

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from onebit_core.artifact.reader import read_manifest
from onebit_core.calibration.sampling import fingerprint_of
from onebit_core.calibration.self_written import write_windows
from onebit_core.cli.main import app
from onebit_core.errors import Cancelled, ConfigError, CorruptArtifact, NotEnoughMemory
from onebit_core.model.loading import load_original, open_original
from onebit_core.pipeline.calibrate import windows_at_once
from onebit_core.pipeline.run import quantize_model
from onebit_core.progress import CancelToken, ProgressEvent, Watch
from tests.support.quantized import tiny_config

SELF = {"text": ["self:"], "samples": 4, "tokens": 32, "seed": 3}


def stages(events):
    return list(dict.fromkeys(event.stage for event in events))


def stop_at(stage, done):
    cancel = CancelToken()

    def sink(event: ProgressEvent) -> None:
        if (event.stage, event.done) == (stage, done):
            cancel.cancel()

    return Watch(sink=sink, cancel=cancel)


def test_a_model_is_calibrated_on_what_it_wrote(tiny_llama, tmp_path):
    """The windows are those the original writes with this seed; the manifest has their fingerprint."""
    events: list[ProgressEvent] = []
    config = tiny_config(tiny_llama, "gptq", calibration=SELF)
    quantize_model(config, tmp_path / "out", watch=Watch(sink=events.append))
    model, tokenizer = load_original(str(tiny_llama), dtype=torch.float32)
    expected_ST = write_windows(model, tokenizer, samples=4, tokens=32, seed=3)
    calibration = read_manifest(tmp_path / "out").calibration
    assert calibration["fingerprints"] == {"self:": fingerprint_of(expected_ST)}
    assert calibration["fingerprint_covers"] == {"self:": "windows"}
    assert stages(events) == ["load", "write text", "calibrate", "quantize", "write"]


def test_what_was_written_is_not_written_again(tiny_llama, tmp_path):
    """A run that was stopped reads it from its work folder, and ends with the same bytes as one that was not."""
    config, work = tiny_config(tiny_llama, "gptq", calibration=SELF), tmp_path / "work"
    quantize_model(config, tmp_path / "undisturbed")
    with pytest.raises(Cancelled):
        quantize_model(config, tmp_path / "out", watch=stop_at("write text", 7), work=work)
    assert not (work / "written.safetensors").exists()
    with pytest.raises(Cancelled):
        quantize_model(config, tmp_path / "out", watch=stop_at("quantize", 1), work=work)
    assert load_file(work / "written.safetensors")["ids"].shape == (4, 32)
    events: list[ProgressEvent] = []
    quantize_model(config, tmp_path / "out", watch=Watch(sink=events.append), work=work)
    assert "write text" not in stages(events)
    assert read_manifest(tmp_path / "out").sha256 == read_manifest(tmp_path / "undisturbed").sha256


def test_text_of_another_run_is_refused_before_hours_of_writing(tiny_llama, tmp_path):
    """Another seed is other text; a damaged file is named."""
    work = tmp_path / "work"
    quantize_model(tiny_config(tiny_llama, "gptq", calibration=SELF), tmp_path / "a", work=work)
    with pytest.raises(ConfigError, match="written for another run"):
        quantize_model(tiny_config(tiny_llama, "gptq", calibration={**SELF, "seed": 4}), tmp_path / "b", work=work)
    (work / "written.safetensors").write_bytes(b"damaged")
    with pytest.raises(CorruptArtifact, match=r"written\.safetensors: damaged .* remove it"):
        quantize_model(tiny_config(tiny_llama, "gptq", calibration=SELF), tmp_path / "b", work=work)


def test_it_mixes_with_files_by_weight(tiny_llama, tmp_path):
    """Three windows of four are the model's own."""
    (tmp_path / "a.txt").write_text("words and more words " * 20)
    text = str(tmp_path / "a.txt")
    calibration = {**SELF, "text": [text, "self:"], "weights": [1, 3]}
    quantize_model(tiny_config(tiny_llama, "gptq", calibration=calibration), tmp_path / "out", work=tmp_path / "work")
    recorded = read_manifest(tmp_path / "out").calibration
    assert recorded["weights"] == [1.0, 3.0]
    assert recorded["fingerprint_covers"] == {text: "text", "self:": "windows"}
    assert load_file(tmp_path / "work" / "written.safetensors")["ids"].shape == (3, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_a_model_writes_on_the_gpu(tiny_llama, tmp_path):
    """The same draws decide there, so the first tokens of documents are those of the CPU."""
    config = tiny_config(tiny_llama, "gptq", calibration=SELF, device="cuda")
    quantize_model(config, tmp_path / "out", work=tmp_path / "work")
    model, tokenizer = load_original(str(tiny_llama), dtype=torch.float32)
    on_cpu_ST = write_windows(model, tokenizer, samples=4, tokens=32, seed=3)
    assert torch.equal(load_file(tmp_path / "work" / "written.safetensors")["ids"][:, 0], on_cpu_ST[:, 0])


def test_a_method_without_calibration_lets_nobody_write(tiny_llama, tmp_path):
    """Rounding reads no text."""
    events: list[ProgressEvent] = []
    config = tiny_config(tiny_llama, "rtn", calibration=SELF)
    quantize_model(config, tmp_path / "out", watch=Watch(sink=events.append))
    assert "write text" not in stages(events)


def test_an_original_that_does_not_fit_is_refused(tiny_llama, monkeypatch):
    """Fewer windows at once while that helps, then one sentence with the numbers and what to do."""
    original = open_original(str(tiny_llama))
    model = 4 * original.num_parameters
    free = namedtuple("free", "available total")

    def with_free(size):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free(available=size, total=size))
        return windows_at_once(original, 32, 128, "cpu")

    window = 2 * 2 * 32 * 128 * 4  # layers, keys and values, two heads of 16, tokens, bytes
    assert with_free(1 << 40) == 32
    halved = with_free(model + 12 * window)
    assert halved in (1, 2, 4, 8)
    for size in (model // 2, model + window // 2):
        with pytest.raises(NotEnoughMemory, match=r"whole original.*onebit write-text"):
            with_free(size)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_writes_json_lines_that_can_be_calibrated_on(tiny_llama, tmp_path):
    """One object with text a line; the same for the same seed; an existing file is kept."""
    sizes = ("--documents", 6, "--tokens", 64, "--device", "cpu", "--progress", "none")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert "6 documents" in run(
            "write-text", tiny_llama, "--out", tmp_path / f"{name}.jsonl", *sizes, "--seed", seed
        )
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c
    assert [set(json.loads(line)) for line in a.rstrip("\n").split("\n")] == [{"text"}] * 6
    with pytest.raises(ConfigError, match="exists already"):
        run("write-text", tiny_llama, "--out", tmp_path / "a.jsonl", *sizes)
    with pytest.raises(ConfigError, match="at most 512"):
        run("write-text", tiny_llama, "--out", tmp_path / "d.jsonl", "--tokens", 4096)
    with pytest.raises(ConfigError, match="cannot be written"):
        run("write-text", tiny_llama, "--out", tmp_path / "none" / "d.jsonl", *sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    calibration = {**SELF, "text": [str(tmp_path / "a.jsonl")], "samples": 2}
    quantize_model(tiny_config(tiny_llama, "gptq", calibration=calibration), tmp_path / "out")

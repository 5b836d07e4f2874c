"""The installed onebit command, from quantize to inspect; and what it says to input that cannot be used.

Each refusal is one sentence on standard error, exit code 2, and nothing half-written.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_model import save_tiny_model

ONEBIT = Path(sys.executable).with_name("onebit")
QUICK = ("--samples", "4", "--tokens", "32", "--device", "cpu")


def onebit(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ONEBIT, *map(str, words)], capture_output=True, text=True, check=False, cwd=cwd, timeout=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "model")


def check_refused(done: subprocess.CompletedProcess[str], folder: Path, *parts: str) -> None:
    """Check for one sentence with all parts, exit code 2, and no artifact."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0]
    assert not [path for path in folder.iterdir() if "artifact" in path.name], list(folder.iterdir())


def test_train_and_look_at_the_curve(model, tmp_path):
    """From artifact to a better one; what it learned is told, shown, and warned of where it would flatter."""
    text = tmp_path / "text.txt"
    text.write_text("All animals are equal, but some bytes are more equal than others. " * 80)
    start, trained = tmp_path / "start", tmp_path / "trained"
    assert onebit("quantize", model, "--method", "svid", *QUICK, "--out", start).returncode == 0
    few = ("--steps", 6, "--batch", 2, "--tokens", 32, "--set", "held_out=2", "--set", "evaluate_every=3")
    done = onebit("train", start, "--text", text, *few, "--device", "cpu", "--out", trained)
    assert done.returncode == 0, done.stderr
    assert "6 steps, KL on windows held out" in done.stdout
    shown = onebit("inspect", trained)
    assert "training         6 steps of 2 windows of 32 tokens" in shown.stdout
    assert "none" in onebit("inspect", start).stdout
    page = tmp_path / "report.html"
    assert onebit("inspect", trained, "--html", page).returncode == 0
    assert "nats per token" in page.read_text()
    measured = onebit("evaluate", trained, "--text", f"same={text}", "--windows", 1, "--window-tokens", 64)
    assert "trained on this text" in measured.stdout + measured.stderr
    check_refused(
        onebit("train", start, "--text", text, "--set", "stepz=1", "--out", tmp_path / "b"), tmp_path, "stepz"
    )
    check_refused(onebit("train", model, "--text", text, "--out", tmp_path / "b"), tmp_path, "not an onebit artifact")


def test_quantize_evaluate_inspect(model, tmp_path):
    """The three commands of the README, one after the other."""
    text = tmp_path / "text.txt"
    text.write_text("All animals are equal, but some bytes are more equal than others. " * 40)
    artifact = tmp_path / "artifact"
    made = onebit("quantize", model, "--method", "gptq", "--set", "group_size=32", *QUICK, "--out", artifact)
    assert made.returncode == 0, made.stderr
    assert "bits per linear weight" in made.stdout
    measured = onebit("evaluate", artifact, "--text", f"animals={text}", "--windows", 2, "--window-tokens", 64)
    assert measured.returncode == 0, measured.stderr
    assert "animals" in measured.stdout
    shown = onebit("inspect", artifact, "--json")
    values = json.loads(shown.stdout)
    result = values["report"]["evaluation"][0]
    assert result["dataset"] == "animals"
    assert 0 < result["kl_mean"] < 10
    page = tmp_path / "report.html"
    assert onebit("inspect", artifact, "--html", page).returncode == 0
    assert "<svg" in page.read_text()


def test_progress_as_json_lines(model, tmp_path):
    """A program can follow: every line is an object, the last one is the result."""
    artifact = tmp_path / "artifact"
    done = onebit("quantize", model, "--method", "rtn", *QUICK, "--out", artifact, "--progress", "json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["event"] for line in lines[:-1]} == {"progress"}
    assert lines[-1] == {"event": "result", "artifact": str(artifact)}
    blocks = [line for line in lines if line.get("stage") == "quantize"]
    assert blocks[-1]["done"] == blocks[-1]["total"] == 2


def test_sigterm_cancels_cleanly_and_the_run_continues(tmp_path):
    """SIGTERM ends with exit code 3, keeps finished blocks, and the next run completes from them."""
    model = save_tiny_model(tmp_path / "model", num_layers=12)
    words = ["quantize", model, "--method", "gptq", "--set", "group_size=32", "--samples", 16, "--tokens", 256]
    words += ["--device", "cpu", "--out", tmp_path / "artifact", "--work-dir", tmp_path / "work", "--progress", "json"]
    running = subprocess.Popen([ONEBIT, *map(str, words)], stdout=subprocess.PIPE, text=True)
    for line in running.stdout:
        if json.loads(line).get("stage") == "quantize" and json.loads(line)["done"] == 1:
            running.send_signal(signal.SIGTERM)
            break
    last = json.loads(running.stdout.read().splitlines()[-1])
    assert running.wait(timeout=60) == 3
    assert last["event"] == "cancelled"
    assert not (tmp_path / "artifact").exists()
    kept = len(list((tmp_path / "work").glob("block_*")))
    assert 1 <= kept < 12
    assert onebit(*words).returncode == 0
    assert (tmp_path / "artifact" / "manifest.json").is_file()


def test_help_and_version_and_methods():
    """The front door."""
    assert "quantize" in onebit("--help").stdout
    assert onebit("--version").stdout.startswith("onebit 0.")
    assert "pb_llm" in onebit("methods").stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--method", "gtpq"), ("unknown method 'gtpq'", "known: rtn, gptq, svid, pb_llm")),
        (("--method", "rtn", "--set", "bits=99"), ("bits 99", "1 to 8")),
        (("--method", "rtn", "--set", "bits=four"), ("RtnConfig.bits", "'four'")),
        (("--method", "rtn", "--set", "bits=NaN"), ("RtnConfig.bits",)),
        (("--method", "rtn", "--set", "bitz=4"), ("unknown option 'bitz'", "known: bits")),
        (("--method", "rtn", "--set", "bits"), ("write KEY=VALUE",)),
        (("--method", "pb_llm", "--set", "ratio=1.5"), ("ratio 1.5",)),
        (("--method", "rtn", "--set", "group_size=48"), ("block 0", "group_size 48", "nearest")),
        (("--method", "rtn", "--embedding-bits", "5"), ("embedding_bits", "4, 8, 16")),
        (
            ("--method", "gptq", "--set", "group_size=32", "--tokens", "64", "--calibration", "/no/such.txt"),
            ("/no/such.txt", "no such"),
        ),
        (("--method", "gptq", "--set", "group_size=32", "--tokens", "4096"), ("4096", "at most 512")),
        (("--method", "gptq", "--set", "group_size=32", "--samples", "0"), ("at least 1 sample",)),
        (("--method", "rtn", "--device", "cuda:99"), ("no CUDA device",)),
        (("--method", "rtn", "--config", "/no/config.json"), ("/no/config.json",)),
    ],
)
def test_settings_that_cannot_be_meant(model, tmp_path, words, parts):
    """Unknown names, impossible values and wrong types are named with the remedy."""
    if "cuda:99" in words and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    check_refused(onebit("quantize", model, *words, "--out", tmp_path / "artifact"), tmp_path, *parts)


def test_text_too_short_for_the_calibration(model, tmp_path):
    """The message says how much there is and how much was asked for."""
    (tmp_path / "short.txt").write_text("only a few words")
    words = ("--method", "gptq", "--set", "group_size=32", "--calibration", tmp_path / "short.txt", "--tokens", 64)
    done = onebit("quantize", model, *words, "--out", tmp_path / "artifact")
    check_refused(done, tmp_path, "short.txt", "16 tokens are too few for 32 samples of 64")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00binary"])
def test_text_that_is_none(model, tmp_path, content):
    """Empty and binary files are refused by name."""
    (tmp_path / "text.txt").write_bytes(content)
    words = ("--method", "gptq", "--set", "group_size=32", "--calibration", tmp_path / "text.txt", "--tokens", 64)
    check_refused(onebit("quantize", model, *words, "--out", tmp_path / "artifact"), tmp_path, "text.txt")


@pytest.mark.parametrize(
    ("name", "part"),
    [("/no/such/model", "no such folder or file"), ("nobody/nothing", "nobody/nothing"), (".", "without config.json")],
)
def test_a_model_that_is_not_there(tmp_path, name, part):
    """A missing path, an unreachable hub id, a folder that is no model."""
    done = onebit("quantize", name, "--method", "rtn", "--out", tmp_path / "artifact", cwd=tmp_path)
    check_refused(done, tmp_path, part)


def test_an_architecture_we_do_not_support(tmp_path, model):
    """The message lists the supported ones."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    check_refused(
        onebit("quantize", folder, "--method", "rtn", "--out", tmp_path / "artifact"), tmp_path, "BertModel", "Llama"
    )


def test_pickled_weights_are_not_opened(tmp_path, model):
    """A .bin file is refused with the remedy, and never unpickled."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    done = onebit("quantize", folder, "--method", "rtn", "--out", tmp_path / "artifact")
    check_refused(done, tmp_path, "pickled weights (pytorch_model.bin) are not opened")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path, value):
    """The damaged tensor is named."""
    model = save_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = onebit("quantize", model, "--method", "rtn", "--set", "group_size=32", "--out", tmp_path / "artifact")
    check_refused(done, tmp_path, "model.layers.1.mlp.up_proj.weight", "NaN or infinite")


def test_a_model_too_large_for_memory(tmp_path, model):
    """The estimate and what is free are in the message; nothing was read."""
    sizes = {"hidden_size": 8192, "intermediate_size": 16384, "head_dim": 2048, "num_hidden_layers": 2}
    folder = tmp_path / "huge"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config.update(sizes, vocab_size=20_000_000)
    (folder / "config.json").write_text(json.dumps(config))
    done = onebit("quantize", folder, "--method", "rtn", "--out", tmp_path / "artifact")
    check_refused(done, tmp_path, "GiB")


def test_a_disk_that_cannot_be_written(tmp_path, model):
    """The folder is named; nothing remains."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    done = onebit("quantize", model, "--method", "rtn", "--set", "group_size=32", "--out", blocked / "artifact")
    check_refused(done, tmp_path, "cannot be made")


def test_serving_what_is_no_artifact(tmp_path, model):
    """Evaluate and inspect refuse a plain model in one sentence."""
    for words in (("inspect", model), ("evaluate", model, "--text", "x=builtin:python")):
        check_refused(onebit(*words), tmp_path, "not an onebit artifact")

"""Artifacts made to harm: code, pickles, headers that lie, tokenizers that never end. None of it is run or believed."""

import asyncio
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onebit_core.artifact.manifest import Report
from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.artifact.weight_files import weights_sha256
from onebit_core.errors import CorruptArtifact, OnebitError
from service.engine.types import EngineConfig
from service.errors import GenerationFailed
from service.metrics import Metrics
from service.registry.artifacts import MOST_ADDED_TOKENS, check_tokenizer_size, read_tokenizer
from service.registry.served import ServedModel
from service.registry.shelf import list_items
from tests.support.quantized import quantize_tiny
from tests.support.scripted_engine import Script, ScriptedEngine
from tests.support.tiny_model import save_tiny_model

ROOT = Path(__file__).parents[2]
CANARY_CODE = "import pathlib\npathlib.Path({canary!r}).touch()\nclass Evil:\n    pass\n"
LOAD = """
import sys
from pathlib import Path
from onebit_core.errors import OnebitError
from service.engine.process import load
from service.engine.types import ARTIFACT_LOADER, ORIGINAL_LOADER, EngineConfig
from service.registry.artifacts import read_tokenizer
for path, loader in zip(sys.argv[1:], (ARTIFACT_LOADER, ORIGINAL_LOADER, ORIGINAL_LOADER)):
    try:
        read_tokenizer(Path(path))
    except OnebitError:
        print("no tokenizer", end=", ")
    try:
        load(EngineConfig(artifact=path, kv_cache_bytes=1 << 20, loader=loader))
        print("loaded")
    except (OnebitError, OSError, ValueError):
        print("refused")
"""


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mknod, (str(self.file),)


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("good") / "artifact", "rtn")


@pytest.fixture
def artifact(good, tmp_path):
    return shutil.copytree(good, tmp_path / "artifact")


def plant(folder: Path, canary: Path) -> None:
    """Put code and pickles everywhere a loader of models has ever looked for them."""
    names = ("evil", "modeling_llama", "configuration_llama", "tokenization_evil", "conftest", "setup", "__init__")
    for name in names:
        (folder / f"{name}.py").write_text(CANARY_CODE.format(canary=str(canary)))
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Touch(canary)))
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        values = json.loads(file.read_text()) if file.exists() else {}
        values["auto_map"] = {**auto_map, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        values["custom_generate"] = "evil.py"
        file.write_text(json.dumps(values))


@pytest.mark.parametrize("optimize", [[], ["-O"]], ids=["plain", "optimized"])
def test_code_and_pickles_in_a_folder_are_never_run(good, tmp_path, optimize):
    """Of an artifact, of an original, and of one that has its weights as pickles only; without asserts too."""
    canary = tmp_path / "canary"
    folders = [shutil.copytree(good, tmp_path / "artifact"), save_tiny_model(tmp_path / "original")]
    folders.append(save_tiny_model(tmp_path / "pickles"))
    for folder in folders:
        plant(folder, canary)
    (folders[2] / "model.safetensors").unlink()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *optimize, "-c", LOAD, *map(str, folders)]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert not canary.exists(), ended.stdout
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert [line.split(", ")[-1] for line in ended.stdout.splitlines()] == ["loaded", "loaded", "refused"]


def header_of(file: Path) -> tuple[dict, bytes]:
    """Take a safetensors file apart."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(artifact: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    """Put one together again, and let the manifest agree with it: the hash is no help here."""
    file = artifact / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "sha256": weights_sha256(artifact)}))


def largest(header: dict) -> str:
    """Return the tensor with most bytes."""
    return max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [0, 1 << 62]},
        {"data_offsets": [1 << 62, 1 << 63]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, 0]},
        {"data_offsets": [0]},
        {"data_offsets": "all"},
        {"shape": [1 << 32, 1 << 32]},
        {"shape": [1 << 63, 2]},
        {"shape": [-1, -1]},
        {"shape": [0]},
        {"shape": []},
        {"dtype": "F64"},
        {"dtype": "EVIL"},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(artifact, change):
    """Offsets and shapes beyond the file, negative, overlapping, overflowing; dtypes of another size or unknown."""
    header, data = header_of(artifact / "model.safetensors")
    header[largest(header)].update(change)
    write(artifact, json.dumps(header).encode(), data)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        load_model(artifact)


def test_tensors_that_share_bytes_are_refused(artifact):
    """Two names for the same bytes would let one be read through the other."""
    header, data = header_of(artifact / "model.safetensors")
    same = [name for name in header if name.endswith("layernorm.weight")]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]
    write(artifact, json.dumps(header).encode(), data)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        load_model(artifact)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 1 << 63),
        (b"{}", (1 << 64) - 1),
        (b"{}", 0),
        (b"{}", 1),
        (b"", 0),
        (b"\xff" * 64, None),
        pytest.param(b"[" * 30_000, None, id="many brackets"),
        pytest.param(b'{"a":' * 30_000, None, id="many braces"),
        (b'{"a": 1}', None),
        (b'{"a": null, "a": {}}', None),
        pytest.param(b" " * 200, None, id="spaces"),
    ],
    ids=str,
)
def test_a_header_that_is_none_is_refused(artifact, header, length):
    """Lengths beyond the file and beyond 63 bits, no JSON, JSON without an end; nothing is listed as whole either."""
    write(artifact, header, b"", length)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        load_model(artifact)
    (item,) = list_items(artifact.parent)
    assert item.damage


def test_a_file_cut_anywhere_is_refused(artifact):
    """At every 4 KB, with the manifest's hash made to fit: found without reading a tensor, by the lister too."""
    whole = (artifact / "model.safetensors").read_bytes()
    for keep in range(0, len(whole), 4096):
        (artifact / "model.safetensors").write_bytes(whole[:keep])
        with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
            load_model(artifact, verify=False)
        (item,) = list_items(artifact.parent)
        assert "model.safetensors" in item.damage


def test_no_file_outside_of_the_folder_is_read(artifact, tmp_path):
    """An index names files of the artifact's own folder only."""
    (artifact / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "sub/../../outside.safetensors"):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (artifact / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(OnebitError, match="not the name of a file"):
            load_model(artifact)


def added(number: int) -> dict:
    """One entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 1000 + number, "content": f"<{number}>", **flags}


def test_a_tokenizer_of_a_million_tokens_is_refused_at_once(artifact):
    """Reading it would take most of a minute, of the server and of the engine."""
    file = artifact / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"] += [added(number) for number in range(MOST_ADDED_TOKENS)]
    file.write_text(json.dumps(values))
    started = time.monotonic()
    with pytest.raises(CorruptArtifact, match=r"its tokenizer adds 5\d{4} tokens, and 50000 may be added"):
        check_tokenizer_size(artifact)
    with (artifact / "tokenizer_config.json").open("r+b") as config:
        config.truncate(9 << 20)
    with pytest.raises(CorruptArtifact, match=r"tokenizer_config.json: it is \d+ bytes large"):
        check_tokenizer_size(artifact)
    assert time.monotonic() - started < 5


def test_a_pattern_that_never_ends_is_refused(artifact):
    """Nested repetition: found with a text that breaks it, at the load and not by the first user."""
    file = artifact / "tokenizer.json"
    values = json.loads(file.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps({**values, "pre_tokenizer": pattern}))
    started = time.monotonic()
    with pytest.raises(CorruptArtifact, match="its tokenizer cannot be read: PanicException"):
        read_tokenizer(artifact)
    assert time.monotonic() - started < 60


def test_a_text_that_breaks_a_tokenizer_ends_one_request(artifact):
    """A pattern may pass the load's texts and fail on a user's: Rust's panic is an error like any other."""
    file = artifact / "tokenizer.json"
    values = json.loads(file.read_text())
    pattern = {"type": "Split", "pattern": {"Regex": "(q+)+$"}, "behavior": "Isolated", "invert": False}
    file.write_text(json.dumps({**values, "pre_tokenizer": pattern}))
    tokenizer = read_tokenizer(artifact)
    served = ServedModel(
        name="x",
        path=artifact,
        manifest=read_manifest(artifact),
        report=Report(),
        tokenizer=tokenizer,
        engine=ScriptedEngine(config=EngineConfig(artifact="x"), script=Script()),
        metrics=Metrics().engine,
    )
    with pytest.raises(GenerationFailed, match="failed on this text"):
        asyncio.run(served.in_tokenizer_thread(lambda: tokenizer("q" * 64 + "!")))
    assert asyncio.run(served.in_tokenizer_thread(lambda: tokenizer("fine")))["input_ids"]

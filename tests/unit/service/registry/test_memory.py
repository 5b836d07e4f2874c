"""What a model needs and what is free: sums checked by hand, on paper artifacts and made-up machines."""

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess

import psutil
import pytest

from onebit_core.artifact.manifest import MOST_PACKED_PER_STORED
from service.errors import DoesNotFit
from service.metrics import Metrics
from service.registry.artifacts import read_identity
from service.registry.gpu_memory import choose_device, gpu_free_bytes
from service.registry.memory import HOST_PROCESS_BYTES, MemoryPlan, Needs, host_free_bytes, needs_of
from service.registry.registry import ModelRegistry
from service.settings import Settings
from tests.support.paper_artifact import paper_manifest, write_paper_artifact
from tests.support.scripted_engine import ScriptedStarter

STORED = 500 + 32 + 280
PARAMETERS = 1000
CONFIG = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 100,
}


@pytest.fixture
def artifact(tmp_path):
    folder = write_paper_artifact(tmp_path / "paper")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def needs(artifact, device="cpu", **settings):
    return needs_of(asyncio.run(read_identity(artifact)), Settings(artifacts=["x"], **settings), device)


@pytest.mark.parametrize(
    ("backend", "weights", "loading"),
    [
        ("auto", int(MOST_PACKED_PER_STORED * STORED), STORED),
        ("dense", 4 * PARAMETERS, STORED),
        ("reference", STORED, 0),
    ],
)
def test_weights_are_what_the_backend_makes_of_them(artifact, backend, weights, loading):
    """Packed, or every weight in the dtype of the activations, or as stored."""
    found = needs(artifact, backend=backend)
    assert (found.weights, found.loading, found.process) == (weights, loading, HOST_PROCESS_BYTES)
    assert found.peak == found.lasting + loading
    if backend == "dense":
        assert needs(artifact, backend=backend, dtype="bfloat16").weights == 2 * PARAMETERS
        assert needs(artifact, "cuda:0", backend=backend).weights == 2 * PARAMETERS


def test_the_cache_is_no_larger_than_all_sequences_of_full_length(artifact):
    """100 positions are 7 pages of 16 tokens; keys and values of 3 layers, 2 heads of 16 numbers in float32."""
    per_token = 2 * 3 * 2 * 16 * 4
    assert needs(artifact, max_num_sequences=5).kv_cache == 5 * 7 * 16 * per_token
    assert needs(artifact, max_num_sequences=5, max_model_len=16).kv_cache == 5 * 16 * per_token
    assert needs(artifact, kv_cache_bytes=1 << 16).kv_cache == 1 << 16
    for broken in ("{", "[]", '{"num_attention_heads": 0, "hidden_size": 1}', '{"num_attention_heads": "x"}'):
        (artifact / "config.json").write_text(broken)
        assert needs(artifact).kv_cache == 1 << 30


def test_a_plan_says_what_helps():
    """Beside the others, or after unloading the one whose name it takes, or not at all."""
    model = Needs(device="cpu", weights=40, loading=20, kv_cache=30, process=10)
    assert model.peak == 100
    assert MemoryPlan(needs=model, free=100).remedy is None
    beside = MemoryPlan(needs=model, free=99, freed=1)
    assert (beside.fits, beside.fits_after_unload) == (False, True)
    assert "unload_first" in beside.remedy
    never = MemoryPlan(needs=model, free=90, freed=9)
    assert not never.fits_after_unload
    assert "more memory" in never.remedy
    assert MemoryPlan(needs=model, free=None).fits


def huge(artifact, tmp_path):
    """An artifact whose manifest says that its weights are larger than this machine."""
    folder = shutil.copytree(artifact, tmp_path / "huge")
    manifest = dataclasses.replace(paper_manifest("huge"), bytes_by_part={"codes": psutil.virtual_memory().total})
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return folder


def test_what_does_not_fit_is_refused_before_anything_is_touched(artifact, tmp_path):
    """With what it needs, what is free, and the remedy; the check can be switched off."""

    async def story(**settings):
        starter = ScriptedStarter()
        registry = ModelRegistry(Settings(artifacts=["x"], **settings), Metrics(), starter)
        await registry.load(artifact, "small")
        for change in (registry.load(folder), registry.swap("small", folder)):
            with pytest.raises(DoesNotFit, match=r"needs \d+\.\d\d GiB on cpu \(weights .*are free.*more memory"):
                await change
        assert [slot.name for slot in registry.slots()] == ["small"]
        assert len(starter.engines) == 1
        assert not (await registry.plan(folder))[1].fits
        assert registry.slots()[0].needs.peak > HOST_PROCESS_BYTES

    folder = huge(artifact, tmp_path)
    asyncio.run(story())
    registry = ModelRegistry(Settings(artifacts=["x"], memory_check="off"), Metrics(), ScriptedStarter())
    assert asyncio.run(registry.load(folder)).name == "huge"


def test_a_model_that_loads_has_its_memory_set_aside(artifact):
    """Two loads do not count on the same bytes, and a loaded engine may still fill its cache."""

    async def story():
        gate, starter = asyncio.Event(), ScriptedStarter()

        async def slow(config):
            await gate.wait()
            return await starter(config)

        registry = ModelRegistry(Settings(artifacts=["x"]), Metrics(), slow)
        before = (await registry.plan(artifact))[1].free
        loading = asyncio.create_task(registry.load(artifact))
        while not registry.slots() or registry.slots()[0].needs is None:
            await asyncio.sleep(0.01)
        peak = registry.slots()[0].needs.peak
        meanwhile = (await registry.plan(artifact, "second"))[1]
        gate.set()
        await loading
        starter.engines[0].pid = os.getpid()  # which holds more than the scripted engine says it needs
        after = (await registry.plan(artifact, "second"))[1]
        same_name = (await registry.plan(artifact))[1]
        return before, peak, meanwhile.free, after.free, same_name.freed

    before, peak, meanwhile, after, freed = asyncio.run(story())
    noise = 256 << 20  # other processes of the machine
    assert abs(before - peak - meanwhile) < noise
    assert after > meanwhile + peak - HOST_PROCESS_BYTES - noise
    assert freed >= HOST_PROCESS_BYTES


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path, version):
    """Limit less usage, its file cache given back; without a limit the machine decides."""
    names = {
        1: (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
        2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    }[version]
    (tmp_path / "memory").mkdir()
    (tmp_path / names[0]).write_text("1000000\n")
    (tmp_path / names[1]).write_text("900000\n")
    (tmp_path / names[2]).write_text(f"anon 5\n{names[3]} 50000\n")
    assert host_free_bytes(tmp_path) == 150_000
    (tmp_path / names[0]).write_text("max\n" if version == 2 else f"{1 << 62}\n")
    machine = psutil.virtual_memory()
    assert 150_000 < host_free_bytes(tmp_path) <= machine.total
    assert host_free_bytes(tmp_path / "nothing") <= machine.total


NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static long cards[] = {11, 22, 33};
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index > 2) return 2;
    *handle = &cards[index];
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *name, void **handle) {
    if (strcmp(name, "MIG-7")) return 2;
    *handle = &cards[2];
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
    memory->total = 100;
    memory->free = *(long *)handle;
    return 0;
}
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    *current = *pending = handle == &cards[2];
    return 0;
}
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory):
    """A working double of NVML with three cards, the last of which is cut into slices."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the double of NVML")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(NVML)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "nvml.so", folder / "nvml.c"], check=True)
    return str(folder / "nvml.so")


@pytest.mark.parametrize(
    ("visible", "index", "free"),
    [
        (None, 0, 11),
        (None, 1, 22),
        (None, 2, None),  # in slices: the card's memory is no slice's
        (None, 3, None),
        ("1,0", 0, 22),
        ("1,0", 1, 11),
        ("1,0", 2, None),
        ("MIG-7", 0, 33),
        ("GPU-unknown", 0, None),
        ("", 0, None),
    ],
)
def test_cuda_device_n_is_the_nth_visible_card(nvml, monkeypatch, visible, index, free):
    """As CUDA numbers them; whatever is not certain is not said."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_free_bytes(index, nvml) == free


def test_without_nvml_nobody_can_tell():
    """No library is no error."""
    assert gpu_free_bytes(0, "libno-such-thing.so") is None
    assert choose_device(Settings(artifacts=["x"], device="cuda")) == "cuda:0"
    assert choose_device(Settings(artifacts=["x"], device="cuda:3")) == "cuda:3"
    assert choose_device(Settings(artifacts=["x"], device="cpu")) == "cpu"

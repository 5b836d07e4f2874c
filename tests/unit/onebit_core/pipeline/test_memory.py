"""What the plan says about memory: items computed by hand, activations that go to disk, and one measured run."""

import os
import resource
from pathlib import Path

import pytest
import torch

from benchmarks.big_model import Shape, measure, write_model
from onebit_core.artifact.reader import read_manifest
from onebit_core.errors import CalibrationError, NotEnoughMemory
from onebit_core.methods import METHODS
from onebit_core.model.loading import open_original
from onebit_core.pipeline.capture import empty_samples
from onebit_core.pipeline.memory import DECIDING_COPIES, HESSIAN_COPIES, estimate_memory
from onebit_core.pipeline.plan import make_plan
from onebit_core.pipeline.run import quantize_model
from tests.support.quantized import quantize_tiny, tiny_config

BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64
MEBIBYTE = 1 << 20


def plan_of(folder, method="gptq", *, calibrated=True, **changes):
    config = tiny_config(folder, method, **changes)
    return estimate_memory(open_original(str(folder)), config, calibrated=calibrated)


def test_items_of_a_tiny_model(tiny_llama):
    """Two blocks of 64, a tied embedding of 320 rows, 4 samples of 32 tokens; all in float32."""
    plan = plan_of(tiny_llama)
    assert plan.outer == 4 * (320 * 64 + 64)
    assert plan.block == 2 * 4 * BLOCK
    assert plan.mapped == max(4 * BLOCK, plan.outer)
    assert plan.statistics == 4 * HESSIAN_COPIES * 128 * 128
    assert plan.deciding == 4 * DECIDING_COPIES * 64 * 128
    assert plan.activations == 4 * (4 * 32 * 64)
    assert (plan.disk, plan.reconstruction, plan.distillation, plan.spreading) == (0, 0, 0, 0)
    assert plan.writing == plan.outer
    blocks = plan.block + plan.forward + plan.deciding + plan.statistics + plan.activations + plan.packed + plan.mapped
    assert plan.peak_bytes == plan.host_bytes == blocks
    assert plan.device_bytes == 0


def test_what_is_not_calibrated_holds_no_activations(tiny_llama):
    """Neither embedding nor Hessian either, and a block once."""
    plan = plan_of(tiny_llama, "rtn", calibrated=False)
    assert (plan.outer, plan.statistics, plan.activations, plan.forward) == (0, 0, 0, 0)
    assert plan.block == 4 * BLOCK


def test_a_gpu_holds_what_is_computed_with(tiny_llama):
    """Main memory keeps activations, packed layers and mapped files; the sum stays."""
    original, config = open_original(str(tiny_llama)), tiny_config(tiny_llama, "gptq")
    on_cpu = estimate_memory(original, config, calibrated=True)
    on_gpu = estimate_memory(original, config, calibrated=True, on_device=True)
    assert on_gpu.device_bytes == on_gpu.block + on_gpu.forward + on_gpu.deciding + on_gpu.statistics
    assert on_gpu.host_bytes == on_gpu.activations + on_gpu.packed + on_gpu.mapped
    assert on_gpu.peak_bytes == on_cpu.peak_bytes


@pytest.mark.parametrize("method", METHODS)
def test_packed_layers_take_what_the_artifact_stores(tiny_llama, tmp_path, method):
    """Predicted from the settings alone."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method)
    bits = read_manifest(artifact).bits.linear_true
    plan = plan_of(tiny_llama, method)
    assert plan.packed == pytest.approx(bits * 2 * (BLOCK - 2 * 64) / 8, rel=0.02)


@pytest.mark.parametrize(
    ("reconstruction", "copies"),
    [
        ({}, 1),
        ({"preset": "light", "target": "prefix"}, 2),
        ({"preset": "light", "target": "original"}, 2),
        ({"preset": "full", "target": "prefix"}, 3),
        ({"distill_epochs": 1}, 2),
    ],
)
def test_copies_of_the_activations(tiny_llama, reconstruction, copies):
    """The prefix's; what a block shall learn; what the original has there, which may be the same."""
    plan = plan_of(tiny_llama, reconstruction=reconstruction)
    assert plan.activations == copies * 4 * (4 * 32 * 64)
    assert (plan.distillation > 0) == bool(
        reconstruction.get("distill_epochs") or reconstruction.get("preset") == "full"
    )


def test_activations_that_do_not_fit_go_to_disk(tiny_llama):
    """By themselves with `auto`; with `memory` the run is refused, and the message says what helps."""
    original = open_original(str(tiny_llama))
    huge = {"calibration": {"samples": 1 << 32, "tokens": 512}}
    plan = make_plan(original, tiny_config(tiny_llama, "gptq", **huge)).memory
    assert (plan.activations, plan.disk) == (0, 4 * (1 << 32) * 512 * 64)
    with pytest.raises(NotEnoughMemory, match="--activations disk"):
        make_plan(original, tiny_config(tiny_llama, "gptq", **huge, activations="memory"))
    small = make_plan(original, tiny_config(tiny_llama, "gptq")).memory
    assert small.activations > 0 == small.disk


@pytest.mark.parametrize("reconstruction", [{}, {"preset": "full", "epochs": 2, "target": "prefix"}])
def test_activations_on_disk_give_the_same_bytes(tmp_path, tiny_llama, reconstruction):
    """With all the copies that reconstruction keeps; the file is in the work folder, and gone afterwards."""
    shas = {}
    for place in ("memory", "disk"):
        out, work = tmp_path / place, tmp_path / f"{place}-work"
        config = tiny_config(tiny_llama, "gptq", reconstruction=reconstruction, activations=place)
        quantize_model(config, out, work=work)
        shas[place] = read_manifest(out).sha256
        assert sorted(file.name.partition("_")[0] for file in work.iterdir()) == ["block", "block", "run.json"]
    assert shas["memory"] == shas["disk"]


def test_a_run_may_continue_with_its_activations_elsewhere(tmp_path, tiny_llama):
    """Where they are does not decide the result, so it is not part of the run's fingerprint."""
    assert tiny_config(tiny_llama, activations="disk").fingerprint() == tiny_config(tiny_llama).fingerprint()


def test_samples_in_a_file_are_a_tensor_like_any_other(tmp_path):
    """Written and read as one; the file has no name any more."""
    samples = empty_samples((3, 5, 7), tmp_path / "made")
    assert list((tmp_path / "made").iterdir()) == []
    samples.copy_(torch.arange(105.0).view(3, 5, 7))
    assert torch.equal(samples[[2, 0]], torch.arange(105.0).view(3, 5, 7)[[2, 0]])


def test_a_full_disk_is_known_before_any_work(tmp_path, tiny_llama):
    """Files end at 4 kB here: one sentence, and nothing is left."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(CalibrationError, match=r"cannot hold .* GiB of activations .* --activations memory"):
            quantize_tiny(tiny_llama, tmp_path / "out", "gptq", activations="disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize(("method", "least_share"), [("rtn", 0.4), ("gptq", 0.4)])
def test_the_plan_holds(tmp_path, method, least_share):
    """A model of two 26 MiB blocks, quantized in a process of its own: the most it had is what was planned, or less."""
    shape = Shape(hidden=1024, intermediate=3584, heads=16, kv_heads=4, blocks=2, vocab=512)
    if method == "gptq":
        shape = Shape(hidden=512, intermediate=1792, heads=8, kv_heads=4, blocks=2, vocab=512)
    model = write_model(tmp_path / "model", shape)
    config = {
        "model": str(model), "method": method, "settings": {"group_size": 64},
        "calibration": {"samples": 2, "tokens": 64}, "device": "cpu",
    }  # fmt: skip
    # Freed memory goes back at once, so that only what is held is counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    measured = measure(config, tmp_path / "artifact", environment)
    slack = 32 * MEBIBYTE  # of libraries that are loaded on the way
    assert measured.peak_resident <= measured.planned_host + slack
    assert measured.peak_anonymous >= least_share * measured.planned_host

"""The same journeys on a CUDA device; skipped where there is none."""

from dataclasses import replace

import pytest
import torch

from onebit_core.artifact.reader import load_model, read_manifest, read_report
from onebit_core.errors import Cancelled
from onebit_core.methods import METHODS
from onebit_core.pipeline.train_artifact import train_artifact
from onebit_core.progress import Watch
from tests.support.backends import backends_on
from tests.support.quantized import quantize_tiny
from tests.support.trained import TEXT, StopsAt, configure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("method", METHODS)
def test_quantizing_on_the_gpu_gives_the_same_kind_of_model(tiny_llama, tmp_path, method):
    """Same bits, and layer errors as on the CPU up to rounding."""
    on_cpu = quantize_tiny(tiny_llama, tmp_path / "cpu", method)
    on_gpu = quantize_tiny(tiny_llama, tmp_path / "gpu", method, device="cuda")
    assert read_manifest(on_gpu).bits == read_manifest(on_cpu).bits
    for one, other in zip(read_report(on_gpu).layers, read_report(on_cpu).layers, strict=True):
        assert one.weight_error == pytest.approx(other.weight_error, rel=0.1, abs=1e-3)


@pytest.mark.parametrize("embedding_bits", [4, 8])
@pytest.mark.parametrize("backend", backends_on("cuda"))
@pytest.mark.parametrize("method", METHODS)
def test_logits_agree_between_devices(tiny_llama, tmp_path, method, backend, embedding_bits):
    """A packed model on the GPU computes what the reference computes on the CPU."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method, embedding_bits=embedding_bits)
    on_cpu = load_model(artifact, backend="reference", dtype="float32").model(IDS).logits
    on_gpu = load_model(artifact, backend=backend, dtype="float32", device="cuda").model(IDS.cuda()).logits
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_training_on_the_gpu_learns_and_goes_on_after_a_stop(tiny_llama, tmp_path, method, dtype):
    """Stopped after some steps and continued from the checkpoint, it ends nearer to the original than it began."""
    (tmp_path / "text.txt").write_text(TEXT)
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method)
    config = replace(configure(artifact, str(tmp_path / "text.txt"), dtype=dtype), device="cuda")
    out, work, watch = tmp_path / "out", tmp_path / "work", Watch(cancel=StopsAt(12))
    with pytest.raises(Cancelled):
        train_artifact(config, out, watch=watch, work=work)
    start, end = read_manifest(train_artifact(config, out, work=work)).training["held_out_kl"]
    assert end < start
    assert load_model(out, device="cuda").model(IDS.cuda()).logits.isfinite().all()

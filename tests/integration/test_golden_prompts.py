"""Golden prompts: an artifact carries them, a right engine agrees with them, a wrong one is not served."""

import asyncio
import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebit_core.artifact.golden import read_golden
from onebit_core.artifact.golden_answers import COMPLETION_TOKENS
from onebit_core.artifact.identity import read_manifest
from onebit_core.artifact.reader import load_model, weights_sha256
from onebit_core.errors import CorruptArtifact
from service.errors import EngineStartFailed
from service.metrics import Metrics
from service.registry.golden import TOLERANCE_NATS
from service.registry.registry import ModelRegistry
from service.settings import Settings
from tests.support.quantized import quantize_tiny

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def written(tiny_llama, tmp_path_factory):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("golden") / "artifact", "rtn")


@pytest.fixture
def artifact(written, tmp_path):
    return shutil.copytree(written, tmp_path / "artifact")


def write_manifest(artifact, **changes):
    values = dataclasses.replace(read_manifest(artifact), **changes).to_dict()
    (artifact / "manifest.json").write_text(json.dumps(values))


def damage(artifact, change):
    """Change one layer's tensors, and the manifest with them: the hash then says that nothing is wrong."""
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    write_manifest(artifact, sha256=weights_sha256(artifact))


def serve(artifact, **settings):
    """Load an artifact into a real engine; return the metrics of the server that did."""

    async def story():
        values = {"artifacts": [str(artifact)], "kv_cache_bytes": 1 << 20, "device": "cpu", **settings}
        metrics = Metrics()
        registry = ModelRegistry(Settings(**values), metrics)
        try:
            await registry.load(artifact, "golden")
            assert [model.name for model in registry.models()] == ["golden"]
        except BaseException:
            assert registry.slots() == []
            raise
        finally:
            await registry.stop()
        return metrics

    return asyncio.run(story())


def error_of(metrics):
    return metrics.registry.get_sample_value("onebit_golden_check_logprob_error_nats", {"model": "golden"})


def test_the_file_holds_what_the_model_says(written):
    """Computed anew by transformers' own greedy search, and by one forward pass over prompt and completion."""
    golden = read_golden(written, read_manifest(written))
    loaded = load_model(written, backend="reference")
    assert len(golden.prompts) >= 3
    for prompt in golden.prompts:
        start = len(prompt.prompt)
        ids = torch.tensor([prompt.prompt])
        found = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COMPLETION_TOKENS, eos_token_id=[]
        )
        assert tuple(found[0, start:].tolist()) == prompt.completion
        with torch.inference_mode():
            logprobs_TV = loaded.model(input_ids=found).logits[0, start - 1 : -1].log_softmax(-1)
        values_TN, ids_TN = logprobs_TV.topk(len(prompt.top_ids[0]))
        assert ids_TN.tolist() == [list(ids) for ids in prompt.top_ids]
        torch.testing.assert_close(values_TN, torch.tensor(prompt.top_logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "golden.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "golden.json").write_text("{}"), "not the manifest's"),
    ],
)
def test_the_manifest_vouches_for_the_file(artifact, change, message):
    """Golden prompts that are missing or changed are a damaged artifact, as weights would be."""
    change(artifact)
    with pytest.raises(CorruptArtifact, match=rf"golden\.json.*{message}"):
        load_model(artifact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_engine_is_served(artifact, dtype):
    """With packed kernels, and in bfloat16: rounding is within the tolerance, and the figure is on the page."""
    metrics = serve(artifact, dtype=dtype, backend="auto")
    assert 0 < error_of(metrics) < TOLERANCE_NATS[dtype] / 2
    stamp = metrics.registry.get_sample_value("onebit_golden_check_timestamp_seconds", {"model": "golden"})
    assert stamp > 1.7e9
    asked = metrics.registry.get_sample_value("onebit_prompt_tokens_total", {"model": "golden"})
    assert not asked, "golden prompts are not traffic"


def flip_bits(tensors):
    tensors[f"{LAYER}.planes"][-1].bitwise_xor_(torch.tensor(1 << 7, dtype=torch.int32))


def wrong_scale(tensors):
    tensors[f"{LAYER}.scale"].mul_(1.5)


def invert_plane(tensors):
    tensors[f"{LAYER}.planes"][-1].bitwise_not_()


@pytest.mark.parametrize(
    ("change", "dtype"), [(flip_bits, "float32"), (wrong_scale, "float32"), (invert_plane, "bfloat16")]
)
def test_a_wrong_engine_is_refused(artifact, change, dtype):
    """A thirty-second of one layer's bits, its scale, or a whole plane inverted; the name is free again."""
    damage(artifact, change)
    with pytest.raises(EngineStartFailed, match="golden"):
        serve(artifact, dtype=dtype, backend="dense")


def test_the_check_can_be_switched_off(artifact):
    """Then the model is served as it is, and no figure claims that it was checked."""
    damage(artifact, wrong_scale)
    assert error_of(serve(artifact, golden_check="off")) is None


def test_an_artifact_without_golden_prompts_is_served(artifact, caplog):
    """Its manifest has no hash of a file, so none counts; the log says that nothing was checked."""
    write_manifest(artifact, golden_sha256="")
    assert error_of(serve(artifact)) is None
    assert "served without a check of golden prompts" in caplog.text


def test_a_model_that_cannot_answer_is_written_without(tiny_llama, tmp_path, caplog):
    """A context too short for the prompts costs the check, not the artifact."""
    model = shutil.copytree(tiny_llama, tmp_path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    out = quantize_tiny(model, tmp_path / "artifact", "rtn", calibration={"samples": 2, "tokens": 8})
    assert "without golden prompts (its context of 8 tokens" in caplog.text
    assert read_golden(out, read_manifest(out)) is None
    load_model(out)

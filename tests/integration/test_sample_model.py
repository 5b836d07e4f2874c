"""The real sample model: a GGUF file in, two artifacts out, and error feedback earns its keep."""

import asyncio

import pytest
import torch

from onebit_core.artifact.manifest import ORIGINAL
from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.errors import ModelNotFound, UnsupportedModel
from onebit_core.evaluation.compare import evaluate_models
from onebit_core.evaluation.windows import read_windows
from onebit_core.model.gguf import convert_gguf
from onebit_core.model.loading import load_original, open_original
from onebit_core.model.sample import sample_model_path
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from service.engine.types import ORIGINAL_LOADER
from service.registry.artifacts import read_identity
from tests.support.inline_engine import InlineEngine, greedy

SETTINGS = {"bits": 4, "group_size": 64}


@pytest.fixture(scope="module")
def sample():
    try:
        return sample_model_path()
    except ModelNotFound as error:
        pytest.skip(str(error))


def test_a_gguf_file_opens_as_the_model_it_is(sample):
    """Thirty Llama blocks of 576, tied embedding, 134.5 million weights."""
    original = open_original(str(sample))
    assert original.architecture == "LlamaForCausalLM"
    assert len(original.blocks) == 30
    assert original.num_parameters == 134_515_008
    assert all(parameter.is_meta for parameter in original.model.parameters())


def test_a_gguf_file_is_served_as_an_original(sample):
    """Described without a name or a bit of its own, and continued by the engine as transformers continues it."""
    identity = asyncio.run(read_identity(sample))
    assert (identity.manifest.name, identity.manifest.method) == (sample.stem, ORIGINAL)
    assert (identity.manifest.source.parameters, identity.manifest.bits.whole_model) == (134_515_008, 16.0)
    engine = InlineEngine(identity.folder, loader=ORIGINAL_LOADER, kv_cache_bytes=1 << 26)
    prompt = engine.tokenizer("The capital of France is")["input_ids"]
    (result,) = engine.run([greedy(0, prompt, 6)])
    model, _ = load_original(str(identity.folder), dtype=torch.float32)
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert result.token_ids == made[0, len(prompt) :].tolist()
    assert "Paris" in result.text


def test_a_file_that_only_looks_like_gguf_is_refused(tmp_path):
    """By its first bytes, or by what transformers cannot read."""
    for content in (b"not at all", b"GGUF" + b"\xff" * 100):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(UnsupportedModel, match=r"x\.gguf"):
            convert_gguf(tmp_path / "x.gguf", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_gptq_beats_rtn_at_4_bits(sample, tmp_path):
    """On the real model, same grid, the same bits, text neither has seen; and both are close to the original."""
    calibration = {"samples": 8, "tokens": 256}
    configs = {
        "rtn": {"model": str(sample), "method": "rtn", "settings": SETTINGS},
        "gptq": {"model": str(sample), "method": "gptq", "settings": SETTINGS, "calibration": calibration},
    }
    models = {}
    for name, values in configs.items():
        path = quantize_model(QuantizeConfig.from_dict({**values, "device": "cpu"}), tmp_path / name)
        assert read_manifest(path).bits.linear_true == 4.3125
        models[name] = load_model(path).model
    original, tokenizer = load_original(str(sample), dtype=torch.float32)
    text = read_windows("docs", "builtin:python-heldout", tokenizer, windows=4, window_tokens=512)
    results = evaluate_models(original, models, text)
    assert results["gptq"].kl_mean < 0.8 * results["rtn"].kl_mean < 0.5
    assert results["gptq"].compressed.value < results["rtn"].compressed.value < 1.6 * results["rtn"].original.value

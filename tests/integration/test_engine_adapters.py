"""Sequences of different adapters in one batch write what each writes alone; the base writes what it always wrote."""

from dataclasses import replace

import pytest
import torch

from onebit_core.adapters.identity import read_adapter_info
from onebit_core.adapters.scales import AdapterSwitch, read_scales
from onebit_core.artifact.reader import load_model
from onebit_core.errors import CorruptArtifact
from onebit_core.pipeline.adapt import adapt_artifact
from service.engine.types import EngineConfig
from service.errors import EngineStartFailed
from tests.support.adapted import adapting, written_text
from tests.support.generated import generated
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model

LOADER = EngineConfig(artifact="").loader
NAMES = ("", "mill", "other")
PROMPTS = [list(range(5, 9 + 7 * index)) for index in range(9)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written_text(tmp_path_factory.mktemp("text"))


def made(folder, text, architecture: str = "llama", method: str = "svid"):
    """Make an artifact and two adapters that say other things than it does."""
    artifact = quantize_tiny(save_tiny_model(folder / "model", architecture=architecture), folder / "small", method)
    for name, seed in (("mill", 0), ("other", 1)):
        adapt_artifact(adapting(artifact, text, name=name, seed=seed, scale_rate=0.4), folder / name)
    return artifact, tuple((name, str(folder / name), read_adapter_info(folder / name).sha256) for name in NAMES[1:])


@pytest.fixture(scope="module")
def models(tmp_path_factory, text):
    return made(tmp_path_factory.mktemp("models"), text)


def engine_on(artifact, adapters, **config):
    return InlineEngine(artifact, loader=LOADER, device="cpu", adapters=adapters, **config)


def expected(artifact, adapters, backend="auto") -> dict[tuple[str, int], list[int]]:
    """Return what transformers' own generate() writes for every name and prompt."""
    loaded = load_model(artifact, device="cpu", dtype="float32", backend=backend)
    switch = AdapterSwitch(loaded.model, torch.device("cpu"))
    for name, folder, _ in adapters:
        switch.add(name, read_scales(folder, read_adapter_info(folder)))
    written = {}
    for name in NAMES:
        for index, prompt in enumerate(PROMPTS):
            switch.rows = torch.tensor([switch.index(name)]) if name else None  # one row for all tokens
            written[name, index] = generated(loaded.model, prompt, 10, eos_token_id=-1)
    return written


def requests() -> list:
    """Return every prompt with the base and both adapters, the names taking turns."""
    return [
        replace(greedy(index, prompt, 10), adapter=name, request_id=f"{name}-{index}")
        for index, prompt in enumerate(PROMPTS)
        for name in NAMES
    ]


@pytest.mark.parametrize("config", [{}, {"fuse": False}, {"max_batched_tokens": 24}, {"backend": "dense"}])
def test_a_mixed_batch_writes_what_each_writes_alone(models, config):
    """Fused or not, prompts whole or in chunks, packed or dense."""
    artifact, adapters = models
    wanted = expected(artifact, adapters, config.get("backend", "auto"))
    assert wanted["", 4] != wanted["mill", 4] != wanted["other", 4] != wanted["", 4]
    results = engine_on(artifact, adapters, **config).run(requests())
    for request, result in zip(requests(), results, strict=True):
        index = int(request.request_id.rpartition("-")[2])
        assert result.token_ids == wanted[request.adapter, index], request.request_id


@pytest.mark.parametrize(("architecture", "method"), [("qwen2", "lut2"), ("gemma2", "gptq"), ("qwen3_moe", "svid")])
def test_other_models_and_formats(tmp_path, text, architecture, method):
    """Biases, sliding windows, experts."""
    artifact, adapters = made(tmp_path, text, architecture, method)
    wanted = expected(artifact, adapters)
    for request, result in zip(requests(), engine_on(artifact, adapters).run(requests()), strict=True):
        assert result.token_ids == wanted[request.adapter, int(request.request_id.rpartition("-")[2])]


def test_cached_pages_are_not_shared_across_adapters(models):
    """The same prompt, asked again with another adapter, is computed anew, and with the same one is not."""
    artifact, adapters = models
    engine = engine_on(artifact, adapters, page_size=4)
    prompt = PROMPTS[-1]
    cached = []
    for turn, name in enumerate(("", "mill", "mill", "other", "")):
        before = engine.stats.prefix_cache_hits if engine.reports else 0
        engine.run([replace(greedy(0, prompt, 2), adapter=name, request_id=f"turn-{turn}")])
        cached.append(engine.stats.prefix_cache_hits - before)
    most = (len(prompt) - 1) // 4 * 4
    assert cached == [0, 0, most, 0, most]
    engine.run([replace(greedy(0, prompt, 2), request_id="salted")])
    tricky = replace(greedy(0, prompt, 2), cache_salt="4:mill", request_id="tricky")
    before = engine.stats.prefix_cache_hits
    engine.run([tricky])
    assert engine.stats.prefix_cache_hits == before


def test_the_base_is_computed_as_without_adapters_while_nobody_asks_for_one(models):
    """Log probabilities equal to the last bit: fused blocks stay fused."""
    artifact, adapters = models
    asked = [greedy(index, prompt, 6, logprobs=2) for index, prompt in enumerate(PROMPTS)]
    plain, loaded = engine_on(artifact, ()), engine_on(artifact, adapters)
    assert loaded.info.backend == plain.info.backend
    assert loaded.info.memory_bytes > plain.info.memory_bytes
    for one, other in zip(plain.run(asked), loaded.run(asked), strict=True):
        assert one.logprobs == other.logprobs


def test_a_damaged_adapter_ends_the_start(models, tmp_path):
    """Before any request."""
    artifact, adapters = models
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter.json", "adapter.safetensors"):
        content = (artifact.parent / "mill" / name).read_bytes()
        (broken / name).write_bytes(content[:-1] if name.endswith("safetensors") else content)
    with pytest.raises(CorruptArtifact, match="broken"):
        engine_on(artifact, (*adapters, ("broken", str(broken), read_adapter_info(broken).sha256)))


def test_an_adapter_that_was_replaced_is_refused(models):
    """A process that is started again does not take up scales that the server never looked at."""
    artifact, ((name, folder, _), other) = models
    with pytest.raises(EngineStartFailed, match=r"mill: .* is not what it was when the server read it"):
        engine_on(artifact, ((name, folder, other[2]), other))


def test_the_base_goes_on_where_a_mixed_step_has_left_it(models):
    """Log probabilities of a sequence that outlives one with an adapter, and of one that reads its cached pages."""
    artifact, adapters = models
    base = replace(greedy(0, PROMPTS[-1], 24, logprobs=1), request_id="base")
    short = replace(greedy(1, PROMPTS[2], 3), adapter="mill", request_id="short")
    alone = engine_on(artifact, ()).run([base])[0]
    engine = engine_on(artifact, adapters, page_size=16)
    assert "fused blocks" in engine.info.backend
    (mixed, _), again = engine.run([base, short]), engine.run([replace(base, request_id="again")])[0]
    assert engine.stats.prefix_cache_hits > 0
    wanted = [token.logprob for token in alone.logprobs]
    for found in (mixed, again):
        assert [token.logprob for token in found.logprobs] == pytest.approx(wanted, abs=2e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_eight_bit_is_served_beside_adapters(tmp_path, text, tied):
    """It sees fewer rows than the layers that are scaled."""
    folder = save_tiny_model(tmp_path / "model", tied=tied)
    artifact = quantize_tiny(folder, tmp_path / "small", "svid", embedding_bits=8)
    adapt_artifact(adapting(artifact, text, name="mill", scale_rate=0.4), tmp_path / "mill")
    adapters = (("mill", str(tmp_path / "mill"), read_adapter_info(tmp_path / "mill").sha256),)
    loaded = load_model(artifact, device="cpu", dtype="float32")
    switch = AdapterSwitch(loaded.model, torch.device("cpu"))
    switch.add("mill", read_scales(tmp_path / "mill", read_adapter_info(tmp_path / "mill")))
    asked = [replace(request, request_id=str(i)) for i, request in enumerate(requests()) if request.adapter != "other"]
    for request, result in zip(asked, engine_on(artifact, adapters).run(asked), strict=True):
        switch.rows = torch.tensor([switch.index(request.adapter)])
        assert result.token_ids == generated(loaded.model, list(request.prompt_token_ids), 10, eos_token_id=-1)

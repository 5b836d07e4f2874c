"""A finished artifact learns from its original: the same bits, the same parts, and more of what the original says."""

import dataclasses

import pytest
import torch

from onebit_core.artifact.reader import load_model, read_manifest, read_report
from onebit_core.errors import Cancelled, ConfigError, EvaluationError, TooLittleText
from onebit_core.model.loading import load_original
from onebit_core.pipeline.run import quantize_model
from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
from onebit_core.progress import CancelToken, Watch
from tests.support.quantized import quantize_tiny, tiny_config
from tests.support.tiny_model import save_tiny_model

TEXT = "All animals are equal, but some bytes are more equal than others. Four bits good, one bit better. " * 60
METHODS = {
    "svid": {},
    "pb_llm": {"ratio": 0.2},
    "residual": {},
    "nanoquant": {"bits": 2.5, "iterations": 5},
    "gptq": {"bits": 2, "group_size": 32},
    "lut2": {"group_size": 32},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


def training(text: str, **values) -> dict:
    usual = {"steps": 12, "batch": 2, "tokens": 32, "held_out": 2, "evaluate_every": 4, "latent_rate": 0.01}
    return {**usual, "scale_rate": 5e-3, "text": [text], "dtype": "float32", **values}


def configure(artifact, text, **values) -> TrainArtifactConfig:
    return TrainArtifactConfig.from_dict(
        {"artifact": str(artifact), "training": training(text, **values), "device": "cpu"}
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_artifact_has_its_bits_and_says_more(tiny_llama, tmp_path, text, method):
    """Stored bytes do not change by one, and what packed layers compute is what was trained."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method, settings=METHODS[method])
    trained = train_artifact(configure(artifact, text), tmp_path / "trained")
    before, after = read_manifest(artifact), read_manifest(trained)
    assert (after.bits, after.bytes_by_part, after.method) == (before.bits, before.bytes_by_part, before.method)
    assert after.sha256 != before.sha256
    assert after.name == f"{before.name}-trained"
    start, end = after.training["held_out_kl"]
    assert end < start
    assert [entry["step"] for entry in read_report(trained).training] == [0, 4, 8, 12]
    assert measured(tiny_llama, trained) < measured(tiny_llama, artifact)


def measured(model, artifact) -> float:
    """Compute the mean KL on other text, by other means than the training does."""
    original, tokenizer = load_original(str(model), dtype=torch.float32)
    packed = load_model(artifact, dtype="float32").model
    ids = torch.tensor([tokenizer(TEXT[700:1100])["input_ids"]])
    wanted, found = (each(input_ids=ids).logits.double().softmax(-1) for each in (original, packed))
    return float((wanted * (wanted / found).log()).sum(-1).mean())


def test_a_stopped_training_goes_on_to_the_same_bytes(tiny_llama, tmp_path, text):
    """Cancelled after step 6, continued in the same work folder."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "svid")
    config = configure(artifact, text, checkpoint_every=100)
    undisturbed = train_artifact(config, tmp_path / "undisturbed")
    cancel = CancelToken()

    def stop(event) -> None:
        if (event.stage, event.done) == ("train", 6):
            cancel.cancel()

    with pytest.raises(Cancelled):
        train_artifact(config, tmp_path / "out", watch=Watch(sink=stop, cancel=cancel), work=tmp_path / "work")
    assert not (tmp_path / "out").exists()
    seen = []
    watch = Watch(sink=lambda event: seen.append(event.done) if event.stage == "train" else None)
    resumed = train_artifact(config, tmp_path / "out", watch=watch, work=tmp_path / "work")
    assert 5 not in seen
    assert read_manifest(resumed).sha256 == read_manifest(undisturbed).sha256
    losses = [[entry["held_out_kl"] for entry in read_report(path).training] for path in (resumed, undisturbed)]
    assert losses[0] == losses[1]


def test_training_as_the_last_stage_of_a_quantization(tmp_path, text):
    """One command from original to trained artifact; stopped in the training, it does no block twice."""
    model = save_tiny_model(tmp_path / "model")
    config = tiny_config(model, "svid", reconstruction={"preset": "light"}, training=training(text))
    cancel = CancelToken()

    def stop(event) -> None:
        if (event.stage, event.done) == ("train", 3):
            cancel.cancel()

    with pytest.raises(Cancelled):
        quantize_model(config, tmp_path / "out", watch=Watch(sink=stop, cancel=cancel), work=tmp_path / "work")
    blocks = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").glob("block_*")}
    assert len(blocks) == 2
    out = quantize_model(config, tmp_path / "out", work=tmp_path / "work")
    assert {file: file.stat().st_mtime_ns for file in blocks} == blocks
    manifest, report = read_manifest(out), read_report(out)
    assert manifest.training["steps_taken"] == 12
    assert manifest.training["held_out_kl"][1] < manifest.training["held_out_kl"][0]
    assert set(report.seconds) == {"quantize", "train"}
    assert load_model(out).manifest.sha256 == quantized_in_two(model, tmp_path, text)


def quantized_in_two(model, folder, text) -> str:
    """Quantize, then train the artifact; return the hash of its weights."""
    first = quantize_tiny(model, folder / "first", "svid", reconstruction={"preset": "light"})
    return read_manifest(train_artifact(configure(first, text), folder / "second")).sha256


def test_a_model_that_caps_its_logits_learns_too(tmp_path, text):
    """Whose logits are not a plain product of its head."""
    model = save_tiny_model(tmp_path / "model", architecture="gemma2", num_layers=2)
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid")
    start, end = read_manifest(train_artifact(configure(artifact, text), tmp_path / "out")).training["held_out_kl"]
    assert end < start


def test_a_mixture_of_experts_learns_too(tmp_path, text):
    """Every expert's linears are latents like others."""
    model = save_tiny_model(tmp_path / "model", architecture="qwen3_moe")
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid")
    start, end = read_manifest(train_artifact(configure(artifact, text), tmp_path / "out")).training["held_out_kl"]
    assert end < start


def test_what_cannot_be_trained_is_refused_by_name(tiny_llama, tmp_path, text):
    """Before any work; nothing is written."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "svid")
    with pytest.raises(ConfigError, match=r"training\.text"):
        TrainArtifactConfig.from_dict({"artifact": str(artifact), "training": {"steps": 3}})
    with pytest.raises(ConfigError, match=r"training\.steps"):
        TrainArtifactConfig.from_dict({"artifact": str(artifact), "training": {"text": [text]}})
    other = save_tiny_model(tmp_path / "other", seed=1)
    wrong = dataclasses.replace(configure(artifact, text), original=str(other))
    with pytest.raises(ConfigError, match="not those that"):
        train_artifact(wrong, tmp_path / "out")
    gone = quantize_tiny(save_tiny_model(tmp_path / "gone"), tmp_path / "orphan", "svid")
    (tmp_path / "gone").rename(tmp_path / "elsewhere")
    with pytest.raises(EvaluationError, match="--original"):
        train_artifact(configure(gone, text), tmp_path / "out")
    with pytest.raises(TooLittleText):
        train_artifact(configure(artifact, text, samples=5000), tmp_path / "out")
    assert not (tmp_path / "out").exists()

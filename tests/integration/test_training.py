"""A finished artifact learns from its original: the same bits, the same parts, and more of what the original says."""

import dataclasses
import shutil

import pytest
import torch

from onebit_core.artifact.reader import load_model, read_manifest, read_report
from onebit_core.calibration.sampling import sample_tokens
from onebit_core.errors import CalibrationError, Cancelled, ConfigError, EvaluationError, NotEnoughMemory, TooLittleText
from onebit_core.evaluation.overlap import known_text
from onebit_core.model.loading import load_original
from onebit_core.pipeline.run import quantize_model
from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
from onebit_core.pipeline.training import split_windows
from onebit_core.progress import CancelToken, Watch
from tests.support.quantized import SETTINGS, quantize_tiny, tiny_config
from tests.support.tiny_model import save_tiny_model
from tests.support.trained import TEXT, StopsAt, configure, training


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.parametrize("method", SETTINGS)
def test_a_trained_artifact_has_its_bits_and_says_more(tiny_llama, tmp_path, text, method):
    """Stored bytes do not change by one, and what packed layers compute is what was trained."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method)
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


@pytest.mark.parametrize("looks", [4, 5, 9, 12, 16, 17, 18, 30])
def test_a_stopped_training_goes_on_to_the_same_bytes(tiny_llama, tmp_path, text, looks):
    """Wherever it stops - inside of a step, between two, while it measures - nothing is lost and nothing is skipped."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "svid")
    config = configure(artifact, text, checkpoint_every=100, windows_at_once=1)
    undisturbed = train_artifact(config, tmp_path / "undisturbed")
    out, work, seen = tmp_path / "out", tmp_path / "work", []
    with pytest.raises(Cancelled):
        train_artifact(config, out, watch=Watch(sink=seen.append, cancel=StopsAt(looks)), work=work)
    assert not out.exists()
    done = max((event.done for event in seen if event.stage == "train"), default=0)
    again = []
    train_artifact(config, out, watch=Watch(sink=again.append), work=work)
    repeated = [event.done for event in again if event.stage == "train" and 0 < event.done < done]
    assert not repeated, (done, repeated)
    assert read_manifest(out).sha256 == read_manifest(undisturbed).sha256
    curves = [[entry["held_out_kl"] for entry in read_report(path).training] for path in (out, undisturbed)]
    assert curves[0] == curves[1]


def test_a_mixture_goes_on_to_the_same_bytes(tmp_path, text):
    """Experts that no token reached have taken fewer steps of the optimizer than others."""
    model = save_tiny_model(tmp_path / "model", architecture="qwen3_moe")
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid")
    config = configure(artifact, text, tokens=2, steps=8, batch=1)
    undisturbed = train_artifact(config, tmp_path / "undisturbed")
    watch = Watch(cancel=StopsAt(12))
    with pytest.raises(Cancelled):
        train_artifact(config, tmp_path / "out", watch=watch, work=tmp_path / "work")
    out = train_artifact(config, tmp_path / "out", work=tmp_path / "work")
    assert read_manifest(out).sha256 == read_manifest(undisturbed).sha256


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


def test_another_rate_keeps_the_blocks(tmp_path, text):
    """Whoever lowers a rate after a training that went wrong does not quantize again."""
    model, work = save_tiny_model(tmp_path / "model"), tmp_path / "work"
    quantize_model(tiny_config(model, "svid", training=training(text)), tmp_path / "a", work=work)
    blocks = {file: file.stat().st_mtime_ns for file in work.glob("block_*")}
    slower = tiny_config(model, "svid", training=training(text, latent_rate=0.001))
    with pytest.raises(ConfigError, match="checkpoints of another training"):
        quantize_model(slower, tmp_path / "b", work=work)
    shutil.rmtree(work / "training")
    quantize_model(slower, tmp_path / "b", work=work)
    assert {file: file.stat().st_mtime_ns for file in blocks} == blocks


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"text": ["nowhere.txt"]}, CalibrationError, "nowhere.txt"),
        ({"samples": 5000}, TooLittleText, "text.txt"),
        ({"tokens": 600}, ConfigError, "context"),
        ({"windows_at_once": 1 << 40, "batch": 1 << 40, "samples": 8}, NotEnoughMemory, "training.recompute"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_a_block_is_done(tmp_path, text, changes, error, named):
    """By a quantization and by a training of its own, in the same words."""
    model = save_tiny_model(tmp_path / "model")
    config = tiny_config(model, "svid", training=training(text, **changes))
    with pytest.raises(error, match=named):
        quantize_model(config, tmp_path / "out", work=tmp_path / "work")
    assert not list(tmp_path.glob("work/block*"))
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid")
    with pytest.raises(error, match=named):
        train_artifact(configure(artifact, text, **changes), tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
def test_layers_learn_beside_the_embedding_that_is_stored(tmp_path, text, tied):
    """The loss before the first step is that of the artifact, whose embedding and head have 4 bits."""
    model = save_tiny_model(tmp_path / "model", tied=tied)
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid", embedding_bits=4)
    trained = read_manifest(train_artifact(configure(artifact, text), tmp_path / "out"))
    original, tokenizer = load_original(str(model), dtype=torch.float32)
    asked = trained.training
    ids = sample_tokens(tokenizer, [text], samples=asked["samples"], tokens=32, seed=asked["seed"]).ids_ST
    held_out = split_windows(ids, asked["held_out"]).held_out_ST
    packed = load_model(artifact, dtype="float32").model
    wanted, found = (each(input_ids=held_out).logits.double().softmax(-1) for each in (original, packed))
    expected = float((wanted * (wanted / found).log()).sum(-1).mean())
    assert asked["held_out_kl"][0] == pytest.approx(expected, rel=1e-3)
    assert asked["held_out_kl"][1] < asked["held_out_kl"][0]


def test_who_is_trained_twice_remembers_both_texts(tiny_llama, tmp_path, text):
    """Measuring on either flatters, and the artifact says so."""
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "svid")
    once = train_artifact(configure(artifact, text), tmp_path / "once")
    twice = read_manifest(train_artifact(configure(once, str(other)), tmp_path / "twice"))
    assert twice.training["start"] == read_manifest(once).sha256
    assert [list(each["fingerprints"]) for each in twice.training["earlier"]] == [[text]]
    for source in (text, str(other)):
        assert "trained on this text" in known_text(twice.calibration, twice.training, source)


@pytest.mark.parametrize("architecture", ["opt", "qwen2"])
def test_products_in_bfloat16_learn_the_same(tmp_path, text, architecture):
    """With biases, and blocks that are run twice; what is packed is what was trained."""
    model = save_tiny_model(tmp_path / "model", architecture=architecture)
    artifact = quantize_tiny(model, tmp_path / "artifact", "pb_llm", rotation="all")
    ends = [
        read_manifest(train_artifact(configure(artifact, text, dtype=dtype, recompute=True), tmp_path / dtype))
        for dtype in ("float32", "bfloat16")
    ]
    (start, exact), (_, rounded) = (manifest.training["held_out_kl"] for manifest in ends)
    assert exact < start
    assert rounded == pytest.approx(exact, rel=0.1)


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

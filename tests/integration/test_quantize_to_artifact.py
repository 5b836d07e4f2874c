"""Each method on a tiny model: quantize, write, read back, equal logits; on several architectures."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from onebit_core.artifact.reader import load_model, read_manifest, read_report
from onebit_core.calibration.sampling import sample_tokens
from onebit_core.cli.main import app
from onebit_core.errors import ArtifactError, CalibrationError, ConfigError
from onebit_core.evaluation.report_page import layer_notes
from onebit_core.kernels import packed_backend
from onebit_core.layers import quantized_layers
from onebit_core.methods import METHODS
from onebit_core.model.loading import load_original
from onebit_core.progress import ProgressEvent, Watch
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import byte_tokenizer, never_route_to, save_tiny_model

IDS = torch.arange(3, 40)[None]
ARCHITECTURES = ["llama", "qwen3", "opt", "gpt_neox", "qwen3_moe"]


def usable_backends() -> dict[str, float]:
    """Backends that run here, and how far the logits of a tiny model may be off: packed kernels round x to 14 bits."""
    packed = {"cpu": 5e-3} if packed_backend("cpu").why_unavailable() is None else {}
    return {"reference": 1e-4, "dense": 1e-4, **packed}


def rebuild_dense(original, compressed):
    """Put the weights the packed layers stand for into the original model, as plain linears."""
    for name, module in quantized_layers(compressed):
        if name != "lm_head":
            dense_weight(original, name).copy_(module.dequantize())
    return original


def dense_weight(original, name):
    """Return a linear's weight in transformers' model, where all experts of a block are in two tensors."""
    mixture, _, path = name.partition(".experts.")
    if not path:
        return original.get_submodule(name).weight.data
    number, linear = path.split(".")
    experts = original.get_submodule(f"{mixture}.experts")
    if linear == "down_proj":
        return experts.down_proj.data[int(number)]
    return experts.gate_up_proj.data[int(number)].chunk(2)[("gate_proj", "up_proj").index(linear)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_a_reloaded_model_has_the_logits_of_its_weights(tmp_path, architecture, method):
    """On every backend: what the original would compute with the dequantized weights put in, biases and norms too."""
    folder = save_tiny_model(tmp_path / "model", architecture=architecture)
    artifact = quantize_tiny(folder, tmp_path / "artifact", method)
    original, _ = load_original(str(folder), dtype=torch.float32)
    before = original(IDS).logits
    for backend, tolerance in usable_backends().items():
        loaded = load_model(artifact, backend=backend)
        expected = rebuild_dense(original, loaded.model)(IDS).logits
        torch.testing.assert_close(loaded.model(IDS).logits, expected, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(expected, before)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "gemma2", "gemma3", "phi", "phi3", "mixtral", "olmoe"])
def test_other_architectures_are_quantized_too(tmp_path, architecture):
    """Once each: windows, soft caps, fused projections, mixtures whose checkpoints name everything differently."""
    folder = save_tiny_model(tmp_path / "model", architecture=architecture)
    artifact = quantize_tiny(folder, tmp_path / "artifact", "gptq")
    original, _ = load_original(str(folder), dtype=torch.float32)
    loaded = load_model(artifact, backend="dense").model
    expected = rebuild_dense(original, loaded)(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reconstruction": {"preset": "light", "epochs": 2, "batch": 2}},
        {"reconstruction": {"distill_epochs": 1, "distill_rate": 2e-3}},
        {"settings": {"bits": 2, "group_size": 32}, "bits": 3.5},
    ],
    ids=["plain", "reconstruction", "distillation", "spread bits"],
)
def test_an_expert_that_calibration_never_reaches_is_quantized_and_named(tmp_path, changes):
    """Every way of quantizing takes it; its three linears carry the note, and inspect says so in one line."""
    folder = save_tiny_model(tmp_path / "model", architecture="qwen3_moe")
    never_route_to(folder, block=1, expert=3)
    artifact = quantize_tiny(folder, tmp_path / "artifact", "gptq", **changes)
    report = read_report(artifact)
    note = "experts calibration never reached"
    named = [layer.name for layer in report.layers if note in layer.notes]
    prefix = "model.layers.1.mlp.experts.3"
    assert {f"{prefix}.gate_proj", f"{prefix}.up_proj", f"{prefix}.down_proj"} <= set(named)
    assert all(0 <= layer.output_error < 1 for layer in report.layers)
    assert prefix in layer_notes(report)[note]
    shown = CliRunner().invoke(app, ["inspect", str(artifact)]).output
    assert f"{note}: " in shown
    assert prefix in shown
    logits = load_model(artifact, backend="dense").model(IDS).logits
    assert torch.isfinite(logits).all()


def test_a_router_is_copied_bit_for_bit(tmp_path):
    """What decides over all other weights stays as it was, under transformers' name, whatever the checkpoint's is."""
    folder = save_tiny_model(tmp_path / "model", architecture="mixtral")
    artifact = quantize_tiny(folder, tmp_path / "artifact", "rtn")
    before, after = (load_file(path / "model.safetensors") for path in (folder, artifact))
    for block in range(2):
        router = before[f"model.layers.{block}.block_sparse_moe.gate.weight"]
        assert torch.equal(after[f"model.layers.{block}.mlp.gate.weight"], router)
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in after)


@pytest.mark.parametrize("method", METHODS)
def test_two_loads_are_equal_bit_for_bit(tiny_llama, tmp_path, method):
    """Loading changes nothing."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method)
    first, second = (load_model(artifact).model(IDS).logits for _ in range(2))
    assert torch.equal(first, second)


def test_two_runs_give_the_same_file(tiny_llama, tmp_path):
    """Same model, same settings, same seed: the same bytes."""
    first = quantize_tiny(tiny_llama, tmp_path / "a", "pb_llm")
    second = quantize_tiny(tiny_llama, tmp_path / "b", "pb_llm")
    assert read_manifest(first).sha256 == read_manifest(second).sha256


@pytest.mark.parametrize(("bits", "stored_bits", "largest_error"), [(8, 8 + 16 / 64, 0.05), (4, 4 + 20 / 64, 0.25)])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_in_few_bits(tmp_path, tied, bits, stored_bits, largest_error):
    """Tied or not, they cost what the format promises and no second copy, and keep the logits close."""
    folder = save_tiny_model(tmp_path / "model", tied=tied)
    linear = {"bits": 8, "group_size": 32}
    plain = quantize_tiny(folder, tmp_path / "plain", "rtn", settings=linear)
    small = quantize_tiny(folder, tmp_path / "small", "rtn", settings=linear, embedding_bits=bits)
    before, after = (read_manifest(path).bytes_by_part["embedding"] for path in (plain, small))
    weights = (1 if tied else 2) * 320 * 64
    assert before == 4 * weights
    zero_point_bits = 0 if tied or bits == 4 else 8 * 320  # of an untied head in 8 bit, a grouped_int layer
    assert after == (stored_bits * weights + zero_point_bits) / 8
    logits_plain, logits_small = (load_model(path, backend="dense").model(IDS).logits for path in (plain, small))
    error = (logits_plain - logits_small).norm() / logits_plain.norm()
    assert 0 < error < largest_error
    # Where the plain model's lead is clear of the error, the first choice stays.
    top_plain, top_small = logits_plain.topk(2).values, logits_small.argmax(-1)
    clear = (top_plain[..., 0] - top_plain[..., 1]) > 0.5 * top_plain[..., 0]
    agrees = top_small == logits_plain.argmax(-1)
    assert agrees[clear].all()
    assert agrees.float().mean() > 0.6
    for backend, tolerance in usable_backends().items():
        logits = load_model(small, backend=backend).model(IDS).logits
        torch.testing.assert_close(logits, logits_small, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "rtn"])
def test_reconstruction_brings_the_model_nearer_to_the_original(tiny_llama, tmp_path, method):
    """At equal bits the hidden states before the head are closer, and the manifest says how it was trained."""
    reconstruction = {"preset": "light", "epochs": 6, "batch": 2}
    calibration = {"samples": 16, "tokens": 32}
    plain = quantize_tiny(tiny_llama, tmp_path / "plain", method, calibration=calibration)
    trained = quantize_tiny(
        tiny_llama, tmp_path / "trained", method, calibration=calibration, reconstruction=reconstruction
    )
    assert read_manifest(plain).reconstruction == {}
    assert read_manifest(trained).reconstruction["epochs"] == 6
    assert read_manifest(plain).bits == read_manifest(trained).bits
    original, tokenizer = load_original(str(tiny_llama), dtype=torch.float32)
    ids = sample_tokens(tokenizer, ["builtin:python"], samples=4, tokens=32, seed=7).ids_ST
    wanted = original.base_model(ids).last_hidden_state
    errors = [
        (load_model(path, backend="dense").model.base_model(ids).last_hidden_state - wanted).norm()
        for path in (plain, trained)
    ]
    assert errors[1] < errors[0]


def test_distillation_helps_or_is_undone(tiny_llama, tmp_path):
    """A sensible rate brings the logits nearer; one far too large leaves the artifact as it was."""
    plain = quantize_tiny(tiny_llama, tmp_path / "plain", "rtn", settings={"bits": 2, "group_size": 32})
    original, _ = load_original(str(tiny_llama), dtype=torch.float32)
    errors = {}
    for rate in (2e-3, 10.0):
        path = quantize_tiny(
            tiny_llama,
            tmp_path / str(rate),
            "rtn",
            settings={"bits": 2, "group_size": 32},
            reconstruction={"distill_epochs": 4, "distill_rate": rate},
        )
        errors[rate] = (load_model(path, backend="dense").model(IDS).logits - original(IDS).logits).norm()
        assert (read_manifest(path).sha256 == read_manifest(plain).sha256) == (rate == 10.0)
    assert errors[2e-3] < errors[10.0]


def test_bits_are_those_of_the_file(tiny_llama, tmp_path):
    """True bits, whole-model bits and bytes by part add up to the tensors on disk."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "pb_llm")
    manifest = read_manifest(artifact)
    with safe_open(artifact / "model.safetensors", framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  (not iterable)
    assert sum(manifest.bytes_by_part.values()) == sum(tensor.nbytes for tensor in tensors.values())
    linear = {name: tensor for name, tensor in tensors.items() if "_proj." in name}
    weights = sum(64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128 for _ in range(2))
    assert manifest.bits.linear_true == round(8 * sum(t.nbytes for t in linear.values()) / weights, 4)
    assert manifest.bits.whole_model == round(
        8 * sum(t.nbytes for t in tensors.values()) / manifest.source.parameters, 4
    )


def test_manifest_and_report_say_what_was_done(tiny_llama, tmp_path):
    """Method, complete settings, source, calibration with fingerprint, one report per linear."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "gptq", name="my-model")
    manifest, report = read_manifest(artifact), read_report(artifact)
    assert manifest.name == "my-model"
    assert manifest.settings["damping"] == 0.01
    assert manifest.calibration["samples"] == 4
    assert len(manifest.calibration["fingerprints"]["builtin:python"]) == 64
    assert [layer.projection for layer in report.layers[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert len(report.layers) == 14
    assert all(0 <= layer.output_error < 1 for layer in report.layers)


def test_progress_is_told_block_by_block(tiny_llama, tmp_path):
    """Stages in order, every block with its error."""
    events: list[ProgressEvent] = []
    quantize_tiny(tiny_llama, tmp_path / "artifact", "gptq", watch=Watch(sink=events.append))
    assert list(dict.fromkeys(event.stage for event in events)) == ["load", "calibrate", "quantize", "write"]
    blocks = [event for event in events if event.stage == "quantize" and event.done]
    assert [(event.done, event.total) for event in blocks] == [(1, 2), (2, 2)]
    assert all(event.detail["relative_error"] > 0 for event in blocks)


def test_an_existing_folder_is_not_overwritten(tiny_llama, tmp_path):
    """Refused before any work, and left as it was."""
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "precious.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        quantize_tiny(tiny_llama, tmp_path / "artifact")
    assert (tmp_path / "artifact" / "precious.txt").read_text() == "mine"


def test_a_group_that_does_not_fit_is_refused_before_work(tiny_llama, tmp_path):
    """The message names block, layer and the nearest valid size; nothing is written."""
    with pytest.raises(ConfigError, match=r"block 0, self_attn.q_proj: group_size 48 does not divide 64"):
        quantize_tiny(tiny_llama, tmp_path / "artifact", settings={"group_size": 48})
    assert list(tmp_path.iterdir()) == []


def test_later_blocks_are_calibrated_on_the_quantized_prefix(tiny_llama, tmp_path):
    """Block 1's reported error is that on inputs the artifact's own block 0 delivers, first token weighted."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "gptq", settings={"bits": 2, "group_size": 32})
    compressed, tokenizer = load_model(artifact).model, load_model(artifact).tokenizer
    original, _ = load_original(str(tiny_llama), dtype=torch.float32)
    ids = sample_tokens(tokenizer, ["builtin:python"], samples=4, tokens=32, seed=0).ids_ST
    name = "model.layers.1.self_attn.v_proj"
    reported = next(layer for layer in read_report(artifact).layers if layer.name == name).output_error
    errors = {}
    for prefix, model in {"quantized": compressed, "original": original}.items():
        inputs = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, x, kept=inputs: kept.append(x[0]))
        model(ids)
        handle.remove()
        x = inputs[0].double()
        x[:, 0] *= 8.0  # the square root of the first token's weight
        weight = original.get_submodule(name).weight.double()
        decided = compressed.get_submodule(name).dequantize().double()
        errors[prefix] = float((x @ (weight - decided).T).square().sum() / (x @ weight.T).square().sum())
    assert reported == pytest.approx(errors["quantized"], rel=0.01)
    assert reported != pytest.approx(errors["original"], rel=0.01)


def test_what_is_not_quantized_is_copied_bit_for_bit(tmp_path):
    """Norms, biases and embedding keep the original's dtype and bits."""
    folder = save_tiny_model(tmp_path / "model", architecture="opt")
    model, _ = load_original(str(folder), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "half" / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    artifact = quantize_tiny(tmp_path / "half", tmp_path / "artifact", "gptq")
    with (
        safe_open(tmp_path / "half" / "model.safetensors", framework="pt") as before,
        safe_open(artifact / "model.safetensors", framework="pt") as after,
    ):
        shared = set(before.keys()) & set(after.keys())
        assert "model.decoder.layers.0.fc1.bias" in shared
        assert "model.decoder.embed_tokens.weight" in shared
        for name in shared:
            assert after.get_tensor(name).dtype == torch.bfloat16
            assert torch.equal(after.get_tensor(name), before.get_tensor(name))


@pytest.mark.parametrize("embedding_bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_single_block_of_odd_width_on_the_least_calibration(tmp_path, method, embedding_bits):
    """Rows that fill no word, one window of two tokens, one block; embedding and head in few bits."""
    folder = save_tiny_model(tmp_path / "model", num_layers=1, hidden_size=48, intermediate_size=72, tied=False)
    groups, bits = {"group_size": 24}, {"bits": 4.0}
    small = {"rtn": groups, "gptq": groups, "omniquant": groups, "nanoquant": bits, "dbf": bits}
    settings = small.get(method, {})
    artifact = quantize_tiny(
        folder, tmp_path / "artifact", method, settings=settings, calibration={"samples": 1, "tokens": 2},
        embedding_bits=embedding_bits,
    )  # fmt: skip
    dense, packed = (load_model(artifact, backend=backend).model(IDS).logits for backend in ("dense", "reference"))
    assert torch.isfinite(dense).all()
    torch.testing.assert_close(dense, packed, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """An id past the embedding is named before any work."""
    folder = save_tiny_model(tmp_path / "model", vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "text.txt").write_text("the " * 100)
    calibration = {"samples": 1, "tokens": 32, "text": [str(tmp_path / "text.txt")]}
    with pytest.raises(CalibrationError, match="the tokenizer gives id 259, and the embedding has 259 rows"):
        quantize_tiny(folder, tmp_path / "artifact", "gptq", calibration=calibration)
    assert not (tmp_path / "artifact").exists()


def test_activations_that_overflow_are_refused(tmp_path):
    """They would make noise of every weight."""
    folder = save_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 1e25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CalibrationError, match=r"block 0, mlp.gate_proj: its inputs are not finite"):
        quantize_tiny(folder, tmp_path / "artifact", "gptq")

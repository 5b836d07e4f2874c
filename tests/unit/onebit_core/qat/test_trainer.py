"""The loop learns, keeps its best, stops early, and goes on after a stop as if there had been none."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import Cancelled, ConfigError, CorruptArtifact, TrainingError
from onebit_core.latents.student import in_training
from onebit_core.layers import quantized_layers
from onebit_core.methods import METHODS
from onebit_core.model.blocks import blocks_of, layout_of
from onebit_core.model.loading import load_original
from onebit_core.model.replace import replace_module
from onebit_core.progress import CancelToken, Watch
from onebit_core.qat import Checkpoints, Distillation, Trainer, TrainingConfig, TrainingWindows
from onebit_core.qat.trainer import order_of, prepare, rate_at
from tests.support.tiny_model import save_tiny_model

STEPS = 12


def config(**values) -> TrainingConfig:
    usual = {
        "steps": STEPS,
        "batch": 2,
        "windows_at_once": 2,
        "evaluate_every": 4,
        "checkpoint_every": 5,
        "held_out": 2,
    }
    return TrainingConfig(**{**usual, "sign_rate": 2e-3, "latent_rate": 0.1, "dtype": "float32", **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def windows():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (66, 24), generator=draw)
    return TrainingWindows(train_ST=ids[2:], held_out_ST=ids[:2])


class Pair:
    """A tiny original, and the same quantized: with one sign a weight, unless another method is named."""

    def __init__(self, folder, method="svid", settings=None) -> None:
        self.teacher, _ = load_original(str(folder), dtype=torch.float32)
        self.student, _ = load_original(str(folder), dtype=torch.float32)
        self.blocks = blocks_of(self.student, layout_of(type(self.student).__name__))
        for name, module in list(self.blocks.named_modules()):
            if isinstance(module, torch.nn.Linear):
                made = METHODS[method].config.from_dict(settings or {})
                statistics = InputStatistics(hessian_II=torch.eye(module.in_features), num_tokens=1)
                replace_module(self.blocks, name, METHODS[method].quantize(module.weight.detach(), statistics, made))

    def train(self, windows, config, checkpoints=None, watch=None):
        with in_training(self.blocks, partial(prepare, config=config)) as latents:
            probe = windows.held_out_ST[0]
            pair = Distillation(self.student, self.teacher, probe, dtype=torch.float32, recompute=config.recompute)
            return Trainer(pair, latents, windows, config, checkpoints).run(watch or Watch())


def losses(result) -> list[float]:
    return [entry["held_out_kl"] for entry in result.curve]


def test_training_brings_the_student_nearer_to_its_teacher(folder, windows):
    """On windows that were not trained on, whatever the optimizer of signs and the surrogate."""
    ways = [{"sign_optimizer": "adam", "surrogate": surrogate} for surrogate in ("identity", "clipped", "smooth")]
    for way in ({"sign_optimizer": "bop"}, *ways):
        result = Pair(folder).train(windows, config(**way, steps=40))
        assert losses(result)[-1] < 0.8 * losses(result)[0]
        assert result.best == min(result.curve, key=lambda entry: entry["held_out_kl"])


@pytest.mark.parametrize("method", ["svid", "nanoquant", "pb_llm", "residual", "rtn", "lut2"])
def test_every_format_learns_its_scales_where_signs_stay(folder, windows, method):
    """With a rate of nothing for signs and codes, the loss falls, and no sign or code changes."""
    settings = {"bits": 2.0, "iterations": 5} if method == "nanoquant" else {}
    pair = Pair(folder, method, settings)
    before = {name: layer.dequantize().sign() for name, layer in quantized_layers(pair.blocks)}
    result = pair.train(windows, config(steps=20, sign_rate=0.0, latent_rate=0.0, scale_rate=5e-3))
    assert losses(result)[-1] < losses(result)[0]
    if method in ("svid", "pb_llm"):
        assert all(
            torch.equal(layer.dequantize().sign(), before[name]) for name, layer in quantized_layers(pair.blocks)
        )


@pytest.mark.parametrize(("method", "settings"), [("svid", {}), ("pb_llm", {"ratio": 0.2, "metric": "magnitude"})])
def test_scales_in_closed_form_are_those_of_the_latents(folder, windows, method, settings):
    """No factor is trained for them, the start is the artifact, and the end fits the latents' magnitudes."""
    pair = Pair(folder, method, settings)
    before = {name: layer.dequantize() for name, layer in quantized_layers(pair.blocks)}
    with in_training(pair.blocks) as latents:
        for name, latent in latents.items():
            latent.use_closed_form()
            assert "factor.scale_out" not in dict(latent.named_parameters())
            assert torch.allclose(latent.whole_weight(), before[name], atol=1e-6)
            with torch.no_grad():
                latent.latent_POI.mul_(2)
            decided = latent.whole_weight()
            signs = torch.ones_like(decided, dtype=torch.bool) if latent.salient_mask is None else ~latent.salient_mask
            assert torch.allclose(decided[signs], 2 * before[name][signs], rtol=1e-4, atol=1e-6)
            if latent.salient_mask is not None:
                assert torch.equal(decided[~signs], before[name][~signs])
    result = Pair(folder, method, settings).train(
        windows, config(scales="closed_form", sign_optimizer="adam", alpha=1.0, steps=40)
    )
    assert losses(result)[-1] < 0.9 * losses(result)[0]


def test_the_curve_is_measured_and_complete(folder, windows):
    """Every look counts the tokens; the first is before any step."""
    result = Pair(folder).train(windows, config(alpha=1.0))
    assert [entry["step"] for entry in result.curve] == [0, 4, 8, 12]
    assert [entry["tokens"] for entry in result.curve] == [0, 4 * 48, 8 * 48, 12 * 48]
    assert "kl" not in result.curve[0]
    assert all(entry["hidden"] > 0 for entry in result.curve[1:])


def test_small_parts_and_recomputed_blocks_train_the_same(folder, windows):
    """What saves memory changes nothing but the order of sums."""
    whole = losses(Pair(folder).train(windows, config()))
    parts = losses(Pair(folder).train(windows, config(windows_at_once=1, recompute=True)))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_a_run_that_goes_on_takes_the_same_steps(folder, windows, tmp_path):
    """Cancelled after the seventh step, and continued from its checkpoint: the same curve and the same weights."""
    straight, stopped = Pair(folder), Pair(folder)
    expected = straight.train(windows, config())
    cancel = CancelToken()

    def stop_at_seven(event) -> None:
        if event.done == 7:
            cancel.cancel()

    checkpoints = Checkpoints(tmp_path, {"run": 1})
    with pytest.raises(Cancelled):
        stopped.train(windows, config(), checkpoints, Watch(sink=stop_at_seven, cancel=cancel))
    again = Pair(folder)
    found = again.train(windows, config(), Checkpoints(tmp_path, {"run": 1}))
    assert losses(found) == losses(expected)
    assert [entry.get("kl") for entry in found.curve] == [entry.get("kl") for entry in expected.curve]
    for name, tensor in straight.student.state_dict().items():
        assert torch.equal(tensor, again.student.state_dict()[name]), name


def test_checkpoints_of_another_run_are_refused(tmp_path, folder, windows):
    """And one file is kept, not a hundred."""
    Pair(folder).train(windows, config(), Checkpoints(tmp_path, {"run": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training_000012.safetensors"]
    with pytest.raises(ConfigError, match="another training"):
        Checkpoints(tmp_path, {"run": 2})


def test_damaged_checkpoints_are_named(tmp_path, folder, windows):
    """Cut off, of other layers, or gone; with what to remove."""
    Pair(folder).train(windows, config(), Checkpoints(tmp_path, {}))
    file = tmp_path / "training_000012.safetensors"
    whole = file.read_bytes()
    tensors, metadata = load_file(file), {"curve": "[]"}
    save_file({name: value for name, value in tensors.items() if "0.self_attn.q_proj" not in name}, file, metadata)
    with pytest.raises(CorruptArtifact, match=r"q_proj.*train from the start"):
        Pair(folder).train(windows, config(), Checkpoints(tmp_path, {}))
    for damage in (lambda: file.write_bytes(whole[:1000]), file.unlink):
        damage()
        with pytest.raises(CorruptArtifact, match=r"training.json to train from the start"):
            Pair(folder).train(windows, config(), Checkpoints(tmp_path, {}))
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot hold checkpoints"):
        Checkpoints(tmp_path, {})


def test_a_training_that_stalls_ends_early_with_its_best(folder, windows):
    """With absurd rates nothing gets better, and the start is what is kept."""
    pair = Pair(folder)
    before = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}
    result = pair.train(windows, config(steps=400, latent_rate=0.0, scale_rate=30.0, warmup=0.0, patience=2))
    assert result.steps < 400
    assert result.best["step"] == 0
    for name, tensor in pair.student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [("bop", r"scale_rate .* or training.sign_rate"), ("adam", r"latent_rate .* or .*scale_rate")],
)
def test_a_loss_that_is_not_finite_is_named(folder, windows, optimizer, rates):
    """With what to change, of the rates that there are."""
    with pytest.raises(TrainingError, match=f"lower training.{rates} "):
        Pair(folder).train(
            windows, config(sign_optimizer=optimizer, scale_rate=1e30, largest_gradient=1e30, warmup=0.0)
        )


def test_a_failed_training_leaves_the_layers_as_they_were(folder, windows):
    """Nothing is packed that was not finished."""
    pair = Pair(folder)
    before = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}
    with pytest.raises(TrainingError):
        pair.train(windows, config(scale_rate=1e30, largest_gradient=1e30, warmup=0.0))
    for name, tensor in pair.student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_rates_rise_and_fall():
    """From a step's share of the warm-up to a tenth."""
    rates = [rate_at(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_an_epoch_reads_every_window_once():
    """And the next one in another order, the same for the same seed."""
    settings = config(batch=4)
    first = torch.cat([order_of(step, 8, settings) for step in range(2)]).tolist()
    second = torch.cat([order_of(step, 8, settings) for step in range(2, 4)]).tolist()
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert first != torch.cat([order_of(step, 8, config(batch=4, seed=1)) for step in range(2)]).tolist()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"surrogate": "hard"}, "surrogate"),
        ({"batch": 0}, "batch"),
        ({"samples": 2, "held_out": 2}, "held out"),
        ({"warmup": 1.0}, "warmup"),
        ({"latent_rate": -1.0}, "latent_rate"),
        ({"largest_gradient": 0.0}, "largest_gradient"),
        ({"tokens": 1}, "tokens"),
        ({"seed": -1}, "seed"),
        ({"sign_optimizer": "sgd"}, "sign_optimizer"),
        ({"sign_rate": 1.5}, "sign_rate"),
        ({"surrogate": "smooth"}, "surrogate smooth.*bop"),
        ({"scales": "closed_form"}, "scales closed_form.*bop"),
        ({"weights": (1.0,), "text": ("a", "b")}, "weights"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(values, named):
    """By name."""
    with pytest.raises(ConfigError, match=named):
        TrainingConfig(**values)

"""A teacher in 8 bit says what the original says, and takes a byte a weight."""

import pytest
import torch
from torch import nn

from onebit_core.artifact.reader import read_report
from onebit_core.layers import LayerSpec
from onebit_core.model.head import summed_divergence
from onebit_core.model.loading import load_original, open_original
from onebit_core.pipeline.train_artifact import train_artifact
from onebit_core.pipeline.training_memory import training_bytes
from onebit_core.qat.teacher import EightBitLinear, to_eight_bit
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model
from tests.support.trained import TEXT, configure

IDS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3", "qwen3_moe"])
def test_it_says_what_the_original_says(tmp_path, architecture):
    """A thousandth of a nat at most, with biases, fused projections and experts."""
    original, _ = load_original(str(save_tiny_model(tmp_path, architecture=architecture)), dtype=torch.float32)
    expected = original(IDS).logits.flatten(0, 1)
    to_eight_bit(original)
    assert any(isinstance(module, EightBitLinear) for module in original.modules())
    divergence = float(summed_divergence(original(IDS).logits.flatten(0, 1), expected)) / len(expected)
    assert 0 < divergence < 1e-3


def test_a_weight_is_within_half_a_step_and_takes_a_byte():
    """A row of zeros included; products run in the dtype of what comes in."""
    linear = nn.Linear(48, 16)
    with torch.no_grad():
        linear.weight[3] = 0
    packed = EightBitLinear(linear)
    error = packed.codes.float() * packed.scale[:, None] - linear.weight
    assert bool((error.abs() <= packed.scale[:, None] / 2 * 1.001).all())
    assert packed.codes.nbytes == linear.weight.numel()
    assert packed(torch.ones(2, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_student_learns_as_much_from_it(tmp_path):
    """And the plan of memory knows that it is smaller."""
    (tmp_path / "text.txt").write_text(TEXT)
    artifact = quantize_tiny(save_tiny_model(tmp_path / "model"), tmp_path / "artifact", "svid")
    curves = {}
    for teacher in ("original", "int8"):
        config = configure(artifact, str(tmp_path / "text.txt"), teacher=teacher)
        curves[teacher] = read_report(train_artifact(config, tmp_path / teacher)).training
    original = open_original(str(tmp_path / "model"))
    layers = [(64 * 64, LayerSpec(format="sign", in_features=64, out_features=64))]
    plans = [
        training_bytes(original, configure(artifact, "text", teacher=teacher).training, 32, layers)
        for teacher in ("original", "int8")
    ]
    assert plans[0] - plans[1] == 3 * 64 * 64
    before, after = (curves["int8"][place]["held_out_kl"] for place in (0, -1))
    assert after < before
    assert after == pytest.approx(curves["original"][-1]["held_out_kl"], rel=0.05)

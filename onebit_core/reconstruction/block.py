"""Trains the quantized linears of one decoder block until the block does what the original did.

    minimize   mean over tokens   |block(x) - original(x)|^2 / |original(x)|^2     x: inputs from the quantized prefix

over what the formats can change (latents). Each token counts alike, because the next block normalizes it: without the
division the few tokens of huge norm would be all that is learned. Adam, cosine decay to a tenth; the best epoch end is
not searched for: the last state is kept if its loss is below the start's, else the layers stay as they were.

Sources: block-wise reconstruction with straight-through rounding: BRECQ (arXiv:2102.05426, section 3), EfficientQAT
(arXiv:2407.11062, section 3.2); for sign factors NanoQuant (arXiv:2602.06694, section 3).

Shape suffixes: S = samples, T = tokens, D = hidden size, O = output features, I = input features.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from onebit_core.calibration.sampling import evenly
from onebit_core.latents import LATENTS, Latent
from onebit_core.latents.base import each_latent
from onebit_core.layers import QuantizedLinear
from onebit_core.model.replace import replace_module
from onebit_core.reconstruction.config import ReconstructionConfig

Run = Callable[[nn.Module, Tensor], Tensor]
"""(block, hidden [B, T, D]) to the block's output [B, T, D]."""

LOSS_SAMPLES = 32
"""So many, evenly over all, tell whether a block got better."""

ADAM_BETAS = (0.9, 0.95)
LAST_RATE = 0.1


def reconstruct_block(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    samples: tuple[Tensor, Tensor],
    run: Run,
    config: ReconstructionConfig,
    check: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Train the quantized linears of a block in place.

    Args:
        block: a decoder block whose linears named in `weights` are quantized.
        weights: linear name to its original weight, float32 [O, I].
        samples: inputs and the original block's outputs, float32 [S, T, D] each, on the CPU.
        run: runs the block on a batch.
        config: how long and how fast.
        check: called before every step; it may raise to stop, which leaves the block as it was.

    Returns:
        The loss before and after.
    """
    block.requires_grad_(requires_grad=False)
    layers = {name: block.get_submodule(name) for name in weights}
    latents: dict[str, Latent] = {}
    try:
        for name, layer in layers.items():
            assert isinstance(layer, QuantizedLinear)
            latents[name] = LATENTS[layer.spec.format](layer, weights[name])
            replace_module(block, name, latents[name])
        before = _loss_over(block, samples, run, config.batch)
        _train(block, list(latents.values()), samples, run, config, check)
        after = _loss_over(block, samples, run, config.batch)
        if after < before:
            for latent in latents.values():
                latent.harden()
    finally:
        for name, layer in layers.items():
            replace_module(block, name, layer)
    return before, after if after < before else before


def _train(
    block: nn.Module,
    latents: list[Latent],
    samples: tuple[Tensor, Tensor],
    run: Run,
    config: ReconstructionConfig,
    check: Callable[[], None],
) -> None:
    """Run Adam over shuffled batches."""
    assert config.epochs is not None
    assert config.latent_rate is not None
    assert config.scale_rate is not None
    groups = [
        {"params": parameters, "lr": config.latent_rate * rate}
        for latent in latents
        for parameters, rate in latent.rated_latents()
    ]
    groups.append({"params": [value for latent in latents for value in latent.factors()], "lr": config.scale_rate})
    optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS)
    inputs_STD, targets_STD = samples
    steps = config.epochs * -(-len(inputs_STD) // config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
    draw = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(inputs_STD), generator=draw).split(config.batch):
            check()
            loss = block_loss(run(block, inputs_STD[batch]), targets_STD[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for latent in each_latent(latents):
                latent.settle()
            schedule.step()


def cosine(steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor by step: from 1 down to LAST_RATE along half a cosine."""
    return lambda step: LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / max(steps, 1))) / 2


def block_loss(output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean over tokens of the squared relative error."""
    target_BTD = target_BTD.to(output_BTD.device)
    error_BT = (output_BTD - target_BTD).square().sum(-1)
    return (error_BT / target_BTD.square().sum(-1).clamp(min=1e-12)).mean()


@torch.no_grad()
def _loss_over(block: nn.Module, samples: tuple[Tensor, Tensor], run: Run, batch: int) -> float:
    """Return the loss over samples, at most LOSS_SAMPLES of them."""
    inputs_STD, targets_STD = samples
    places = evenly(len(inputs_STD), LOSS_SAMPLES)
    total = 0.0
    for part in places.split(batch):
        output = run(block, inputs_STD[part])
        total += float(block_loss(output, targets_STD[part])) * len(part)
    return total / len(places)

"""Trains the scales of a finished model, all layers together, until its logits are the original's.

    minimize   mean over tokens   KL(softmax(original) || softmax(quantized))

Signs, codes and indices stay as reconstruction left them; scales, levels and shifts, a fraction of a bit per weight,
make up for what blocks did to each other. Blocks are recomputed in the backward pass, so that activations and dense
weights of one block are in memory at a time, besides the latents of all.

Sources: NanoQuant, arXiv:2602.06694, section 3 (scale-only distillation); PEQA, arXiv:2305.14152 (scales alone).

Shape suffixes: S = samples, T = tokens, D = hidden size, V = vocabulary.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from onebit_core.calibration.sampling import evenly
from onebit_core.latents.student import scales_in_training
from onebit_core.model.head import summed_divergence
from onebit_core.model.stand_ins import given_hidden, recomputed
from onebit_core.reconstruction.block import ADAM_BETAS, cosine
from onebit_core.reconstruction.config import DISTILL_SAMPLES, ReconstructionConfig

_log = logging.getLogger(__name__)

Report = Callable[[int, int, float], None]
"""(steps done, steps in all, KL of the step's sample in nats per token)."""


def distill_scales(
    model: nn.Module,
    blocks: nn.ModuleList,
    samples: tuple[Tensor, Tensor],
    config: ReconstructionConfig,
    report: Report,
) -> None:
    """Train the scales of all quantized layers in the blocks of a model, in place.

    Args:
        model: transformers' model; called with input_ids it gives logits.
        blocks: its decoder blocks, with quantized layers.
        samples: token ids int64 [S, T], and what the original's last block makes of them, float32 [S, T, D].
        config: `distill_epochs` and `distill_rate`.
        report: called after every step; it may raise to stop. Scales that end no better than they began are put back.
    """
    assert config.distill_epochs is not None
    assert config.distill_rate is not None
    places = evenly(len(samples[0]), DISTILL_SAMPLES)
    ids_ST, hidden_STD = samples = (samples[0][places], samples[1][places])
    model.requires_grad_(requires_grad=False)
    with scales_in_training(blocks) as by_name, recomputed(blocks):
        latents = list(by_name.values())
        optimizer = torch.optim.Adam(
            [value for latent in latents for value in latent.factors()], lr=config.distill_rate, betas=ADAM_BETAS
        )
        steps = config.distill_epochs * len(ids_ST)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
        draw = torch.Generator().manual_seed(config.seed)
        before, start = mean_divergence(model, blocks, samples), [latent.state() for latent in latents]
        order = [int(i) for _ in range(config.distill_epochs) for i in torch.randperm(len(ids_ST), generator=draw)]
        for step, sample in enumerate(order, start=1):
            loss = divergence(*_both_logits(model, blocks, ids_ST[sample], hidden_STD[sample]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            report(step, steps, float(loss.detach()))
        after = mean_divergence(model, blocks, samples)
        if not after < before:
            for latent, state in zip(latents, start, strict=True):
                latent.load_state_dict(state)
            _log.warning("distillation did not help (KL %.4f, before %.4f); scales stay as they were", after, before)


@torch.no_grad()
def mean_divergence(model: nn.Module, blocks: nn.ModuleList, samples: tuple[Tensor, Tensor]) -> float:
    """Return the KL per token over all samples."""
    total = 0.0
    for ids_T, hidden_TD in zip(*samples, strict=True):
        wanted, found = _both_logits(model, blocks, ids_T, hidden_TD)
        total += float(divergence(wanted, found))
    return total / len(samples[0])


def divergence(wanted_BTV: Tensor, logits_BTV: Tensor) -> Tensor:
    """Return the mean KL(wanted || logits) over tokens, in nats."""
    tokens = wanted_BTV.shape[:-1].numel()
    return summed_divergence(logits_BTV.flatten(0, -2), wanted_BTV.flatten(0, -2)) / tokens


def _both_logits(model: nn.Module, blocks: nn.ModuleList, ids_T: Tensor, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the original's logits of a sample and the model's own, [1, T, V]; gradients for the second."""
    device = next(model.parameters()).device
    ids_1T = ids_T[None].to(device)
    with torch.no_grad(), given_hidden(blocks, hidden_TD[None].to(device)):
        wanted_1TV = _logits(model, ids_1T)
    return wanted_1TV, _logits(model, ids_1T)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits

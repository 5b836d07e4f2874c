"""Turns few signs a step, those whose gradients are the surest: an optimizer for signs that have nothing behind them.

    m <- b1 m + (1 - b1) g          g: gradient of the loss by the sign s, from a batch
    v <- b2 v + (1 - b2) g^2
    r  = s m' / sqrt(v')            ' : divided by 1 - b^step, as Adam does; r > 0: the loss falls if s turns
    the n signs of the largest positive r, among all layers, turn: s <- -s, m <- 0

A sign moves by two, however small the rate: what can be chosen is how many turn at once. Signs of one row that turn
together for the same gradient overshoot, since the gradient is that of a small step. On SmolLM2-135M a ten-thousandth
of all signs, chosen from 16,000 tokens, was already too many on text not seen, and a hundred-thousandth helped
(docs/methods/onebit.md).

Sources: Bop, arXiv:1906.02107 (a moving average of gradients decides about turning, no latent weights); divided by
the root of the second moment: arXiv:2104.05124. Where we differ: the number of signs that turn is given and follows
the rates' schedule, where they have a fixed threshold.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.qat.sharding import own_part

BETAS = (0.9, 0.95)
FEWEST_GRADIENTS = 5
"""So many must have been seen of a sign before it turns; of a first one, all are equally sure."""

SMALLEST = 1e-12
"""Of the second moment's root; a gradient that was never there moves nothing."""


Pick = Callable[[Tensor, int], Tensor]


def among_largest(values_N: Tensor, count: int) -> Tensor:
    """Say of values which are the `count` largest, or all: bool [N]."""
    chosen_N = torch.zeros_like(values_N, dtype=torch.bool)
    chosen_N[values_N.topk(min(count, len(values_N))).indices] = True
    return chosen_N


class Bop(torch.optim.Optimizer):
    """The optimizer; `lr` is the share of all signs that may turn in a step: at least one of them, unless it is 0."""

    def __init__(self, signs: Iterable[nn.Parameter], lr: float = 0.0, among_largest: Pick = among_largest) -> None:
        """Take the parameters whose signs are trained, floating and without zeros, of any shapes.

        Args:
            signs: the parameters; of those that are spread over processes, each process turns its own part.
            lr: share of all signs that may turn in a step.
            among_largest: says which of this process's values are among the so many largest of all.
        """
        super().__init__(signs, {"lr": lr})
        self._among_largest = among_largest

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Turn signs; those without a gradient stay."""
        assert closure is None
        for group in self.param_groups:
            values = [value for value in group["params"] if value.grad is not None]
            if not values:
                continue
            count = max(1, round(group["lr"] * sum(value.numel() for value in group["params"]))) if group["lr"] else 0
            sure, places = zip(*(self._surest(value, count) for value in values), strict=True)
            everywhere = torch.cat(sure)
            may_turn = self._among_largest(everywhere, count) & (everywhere > 0)
            for value, places_N, turns_N in zip(values, places, may_turn.split([*map(len, sure)]), strict=True):
                self._turn(value, places_N[turns_N])

    def _surest(self, value: nn.Parameter, count: int) -> tuple[Tensor, Tensor]:
        """Take in a gradient; return the largest r of this process's part of it, and their places there, flat."""
        state = self.state[value]
        assert value.grad is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(value), torch.zeros_like(value)
        state["step"] += 1
        gradient, mean, square = map(own_part, (value.grad, state["exp_avg"], state["exp_avg_sq"]))
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        first, second = (1 - beta ** float(state["step"]) for beta in BETAS)
        root = (square / second).sqrt_().add_(SMALLEST)
        r = torch.where(own_part(value) < 0, -mean, mean).div_(root).div_(first)
        if state["step"] < FEWEST_GRADIENTS:
            count = 0
        found = r.flatten().topk(min(count, r.numel()))
        return found.values, found.indices

    def _turn(self, value: nn.Parameter, places_N: Tensor) -> None:
        """Turn the signs at places, and wait for new gradients there."""
        own_part(value).view(-1)[places_N] *= -1
        own_part(self.state[value]["exp_avg"]).view(-1)[places_N] = 0

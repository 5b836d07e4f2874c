"""The sign whose gradient is another function's: what lets signs be trained at all.

    forward   s = sign(t), sign(0) = +1
    backward  dL/dt = dL/ds * r(t)
        identity   r = 1                        (arXiv:1308.3432)
        clipped    r = 1 where |t| <= 1, else 0     (arXiv:1602.02830, section 1.3)
        smooth     r = 1.001 - tanh(t)^2        (OneBit, arXiv:2402.11295, and its published code)

t is in units of the mean magnitude of a weight, so `clipped` lets a latent that has grown past it rest, and `smooth`
slows it down by and by.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

Surrogate = Literal["identity", "clipped", "smooth"]

SURROGATES: tuple[Surrogate, ...] = get_args(Surrogate)

SMOOTH_REST = 1.001
"""A little above one: the gradient of a latent far from zero is small, and never nothing."""


class _SignThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, surrogate: Surrogate, dtype: torch.dtype) -> Tensor:
        ctx.surrogate = surrogate
        ctx.save_for_backward(latent)
        return latent.ge(0).to(dtype).mul_(2).sub_(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (latent,) = ctx.saved_tensors
        gradient = gradient.to(latent.dtype)
        if ctx.surrogate == "clipped":
            gradient = gradient * latent.abs().le(1)
        elif ctx.surrogate == "smooth":
            gradient = gradient * (SMOOTH_REST - latent.tanh().square_())
        return gradient, None, None


def sign_through(latent: Tensor, surrogate: Surrogate = "identity", dtype: torch.dtype | None = None) -> Tensor:
    """Return +1 and -1 of a latent's shape, with the gradient of a surrogate.

    Args:
        latent: floating.
        surrogate: see the module text.
        dtype: of the signs; the latent's own by default.
    """
    signs: Tensor = _SignThrough.apply(latent, surrogate, dtype or latent.dtype)  # type: ignore[no-untyped-call]  # torch's
    return signs


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product with x will run: autocast's where that is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype

"""Latents: what a quantized layer can still change, as parameters that gradients reach.

    straight_through   the sign, with the gradient of another function
    base, sign, grouped_int, lut, shared_signs, composed   a format each
    student            all layers of a model at once

Reconstruction trains them block by block, training the whole model. A new format costs one class and a row of LATENTS.
"""

from onebit_core.latents.base import Latent
from onebit_core.latents.composed import LATENTS

__all__ = ["LATENTS", "Latent"]

"""Reconstruction: what quantized layers can still change is trained until a block does what the original did.

    config    how much: presets with their cost
    latents   a layer's signs, codes, levels and scales as parameters
    shared_signs  one latent for all sign planes of a weight
    composed  the same of layers made of layers, and the table of all
    block     the training of one decoder block
    distillation   the training of all scales together against the original's logits

Every format takes part through one table (`composed.LATENTS`), so a new format costs one class.
"""

from onebit_core.reconstruction.block import reconstruct_block
from onebit_core.reconstruction.config import PRESETS, ReconstructionConfig
from onebit_core.reconstruction.distillation import distill_scales

__all__ = ["PRESETS", "ReconstructionConfig", "distill_scales", "reconstruct_block"]

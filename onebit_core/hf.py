"""`import onebit_core.hf`, and transformers' from_pretrained loads onebit artifacts."""

from onebit_core.artifact import registration

__all__ = ["registration"]

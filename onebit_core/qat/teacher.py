"""A teacher in 8 bit: a byte a weight where the original has two or four, for models that else leave a student no room.

    w ~= s_o q,   q = round(w / s_o) in -127..127,   s_o = max |w_o| / 127        (rows; symmetric)

Products run in the dtype of what comes in, with one layer's weight unpacked at a time. What is no linear inside of a
block, such as embedding, head, norms and the stacked experts of a mixture, stays as it is.

Shape suffixes: O = output features, I = input features.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onebit_core.model.blocks import blocks_of, layout_of
from onebit_core.model.replace import replace_module

LARGEST_CODE = 127


class EightBitLinear(nn.Module):
    """A linear whose weight is kept as int8 [O, I] and a float32 scale a row; it has no gradient."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        scale_O = (weight_OI.abs().amax(1) / LARGEST_CODE).clamp(min=torch.finfo(torch.float32).tiny)
        codes_OI = (weight_OI / scale_O[:, None]).round_().to(torch.int8)
        self.codes = nn.Parameter(codes_OI, requires_grad=False)  # a parameter, so that it can be spread over processes
        self.register_buffer("scale", scale_O)
        self.bias: Tensor | None = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; [..., I] to [..., O]."""
        result = nn.functional.linear(x, self.codes.to(x.dtype)) * self.scale.to(x.dtype)
        return result if self.bias is None else result + self.bias.to(x.dtype)


@torch.no_grad()
def to_eight_bit(model: PreTrainedModel) -> None:
    """Put every linear in the blocks of a model into 8 bit, in place."""
    blocks = blocks_of(model, layout_of(type(model).__name__))
    block_to_eight_bit(blocks)


@torch.no_grad()
def block_to_eight_bit(block: nn.Module) -> None:
    """Put every linear inside of a module into 8 bit, in place."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear):
            replace_module(block, name, EightBitLinear(module))

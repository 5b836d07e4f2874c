"""A tiny model saved as OneBit's code saves one, and what it computes, written down from the paper's formula."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from tests.support.tiny_model import save_tiny_model


class PaperLinear(nn.Module):
    """y = LayerNorm((sign(W) (g x)) h)."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> None:
        super().__init__()
        self.sign, self.scale, self.factor = torch.where(weight < 0, -1.0, 1.0), scale, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(x * self.factor, self.sign) * self.scale
        mean, spread = product.mean(-1, keepdim=True), product.var(-1, keepdim=True, unbiased=False)
        return (product - mean) / (spread + 1e-5).sqrt()


def save_published(folder: Path, *, packed: bool = True) -> tuple[Path, LlamaForCausalLM]:
    """Save the folder; return it, and the model that it is."""
    save_tiny_model(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or ".layers." not in path:
            continue
        rows, columns = module.weight.shape
        # Numbers that float16 has exactly, before and after the input scale is brought to a mean of one.
        scale = (torch.rand(rows, generator=generator) + 0.5).half().float()
        factor = torch.tensor([0.5, 1.5]).repeat(columns // 2)[torch.randperm(columns, generator=generator)] / 128
        weight = module.weight.data
        tensors[f"{path}.weight"] = pack(weight) if packed else weight.contiguous()
        tensors[f"{path}.weight_scale"], tensors[f"{path}.input_factor"] = scale, factor
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, PaperLinear(weight, scale, factor))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "bitllama", "architectures": ["BitLlamaForCausalLMInf"], "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return int8 [O, I / 8], column 8 b + i in bit i of byte b, 1 for -1, one bit after the other."""
    packed = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int64)
    for column in range(weight.shape[1]):
        packed[:, column // 8] += (weight[:, column] < 0).long() << column % 8
    return packed.to(torch.uint8).view(torch.int8)

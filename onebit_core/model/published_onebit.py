"""A model that OneBit's authors have published, or that their code has trained, as their code saves it.

    X.weight         int8 [O, I / 8]: bit i of byte b is column 8 b + i, 1 for -1; or floating [O, I], whose signs count
    X.weight_scale   floating [O], h
    X.input_factor   floating [I], g
    X.bias           floating [O], added after the LayerNorm, where the model has any

    y = LayerNorm((sign(W) (g x)) h) + bias      of every linear in the blocks; all else is LLaMA's

Source: the published code of OneBit (arXiv:2402.11295), of which nothing is used but this description.

Shape suffixes: P = planes (one), O = output features, I = input features.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from onebit_core.errors import UnsupportedModel, first_line
from onebit_core.layers import NormedLinear, SignLinear
from onebit_core.model.loading import OriginalModel, find_folder

MODEL_TYPE = "bitllama"
BYTE = 8


class PublishedOnebit(OriginalModel):
    """Such a model; what its linears store is read by `layer`, everything else like an original's."""

    def _read_config(self) -> Any:
        """Read config.json as LLaMA's.

        Raises:
            UnsupportedModel: it is of another model.
        """
        values = super().config_values()
        if values.get("model_type") != MODEL_TYPE:
            raise UnsupportedModel(
                f"{self.folder}: config.json has model_type {values.get('model_type')!r}; a model as OneBit's authors "
                f"save it has {MODEL_TYPE!r}"
            )
        try:
            return AutoConfig.for_model(**self.config_values())
        except Exception as error:
            raise UnsupportedModel(f"{self.folder}: config.json cannot be used ({first_line(error)})") from error

    def config_values(self) -> dict[str, Any]:
        """Return config.json as that of a LLaMA."""
        return {**super().config_values(), "model_type": "llama", "architectures": ["LlamaForCausalLM"]}

    def _check_shapes(self) -> None:
        """Compare every weight's shape on disk with the model's.

        Raises:
            UnsupportedModel: a tensor is missing or misshapen.
        """
        linears = self.linears()
        packed = {f"{path}.weight" for path in linears}
        named = self.model.named_parameters()
        wanted = {name: tuple(value.shape) for name, value in named if name not in packed | self._tied}
        for path, linear in linears.items():
            wanted[f"{path}.weight_scale"] = (linear.out_features,)
            wanted[f"{path}.input_factor"] = (linear.in_features,)
        for name, shape in wanted.items():
            self._check(name, shape)
        for path, linear in linears.items():
            shape = (linear.out_features, linear.in_features)
            self._check(f"{path}.weight", shape, (shape[0], shape[1] // BYTE))

    def _check(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Refuse a tensor that has none of some shapes."""
        found = self.store.shape(self.stored_name(name))
        if found not in shapes:
            known = " or ".join(str(list(shape)) for shape in shapes)
            raise UnsupportedModel(f"{self.folder}: tensor {name!r} has shape {list(found)}, expected {known}")

    def linears(self) -> dict[str, nn.Linear]:
        """Return the linears of the blocks by their path in the model."""
        inside = f"{self.layout.blocks}."
        return {
            path: module
            for path, module in self.model.named_modules()
            if path.startswith(inside) and isinstance(module, nn.Linear)
        }

    def layer(self, path: str) -> NormedLinear:
        """Read the layer of a linear.

        The input scale is stored with mean magnitude one, and the output scale takes up the rest; both as float16.

        Raises:
            BadWeight: a scale holds a NaN or an infinity.
        """
        weight, scale_O, factor_I = (
            self.store.tensor(self.stored_name(f"{path}.{name}")) for name in ("weight", "weight_scale", "input_factor")
        )
        signs_OI = unpack_published(weight) if weight.dtype == torch.int8 else torch.where(weight < 0, -1.0, 1.0)
        size = factor_I.float().abs().mean().clamp(min=1e-12)
        layer = SignLinear.from_parts(
            signs_OI[None], scale_in_PI=(factor_I.float() / size)[None], scale_out_PO=(scale_O.float() * size)[None]
        )
        normed = NormedLinear.around(layer)
        if self.model.get_submodule(path).bias is not None:
            normed.set_bias(self.store.tensor(self.stored_name(f"{path}.bias")))
        return normed


def unpack_published(bytes_OB: Tensor) -> Tensor:
    """Return signs, float32 [O, I], of int8 [O, I / 8]."""
    shifts = torch.arange(BYTE, dtype=torch.uint8)
    bits = bytes_OB.view(torch.uint8)[..., None] >> shifts & 1
    return 1.0 - 2.0 * bits.flatten(1).float()


def is_published(folder: Path) -> bool:
    """Say whether a folder holds such a model."""
    file = folder / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE


def open_published(name: str) -> PublishedOnebit:
    """Open such a model without reading its weights.

    Raises:
        ModelNotFound: no such folder or hub id.
        UnsupportedModel: another model's, or a tensor missing or misshapen.
    """
    return PublishedOnebit(name, find_folder(name))

"""Scales of outputs: learned, written, read, and applied, several adapters side by side in one batch.

    y_t = s_a(t) * layer(x_t)        s_a [out_features]: the scales of the adapter that row t asks for; 1 for none

Signs, codes and stored scales stay what they are, so that all adapters share one model, and a row without an adapter
is computed as if there were none. The scale takes in the layer's bias, where it has one. Experts of a mixture are left
out, for they see their tokens in another order, and the head, which sees only the rows whose logits are wanted.

Source: PEQA, arXiv:2305.14152, section 3.2 (the scales of a quantized model alone are tuned, per output channel). Where
we differ: a factor beside the stored scales in place of other scales, so that it fits every format.

Shape suffixes: T = tokens of all sequences of a step, O = output features, A = adapters and 1.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from onebit_core.adapters.identity import SCALES_FILE, AdapterInfo
from onebit_core.errors import ArtifactError, CorruptArtifact, first_line
from onebit_core.layers import QuantizedLinear, quantized_layers

EXPERTS = ".experts."


def adapted_layers(model: PreTrainedModel) -> dict[str, QuantizedLinear]:
    """Return the layers of a model that an adapter scales, by name: not the head, which only some rows reach."""
    head = model.get_output_embeddings()
    return {name: layer for name, layer in quantized_layers(model) if EXPERTS not in f".{name}." and layer is not head}


class OutputScale(nn.Module):
    """The scale of one layer while it is learned."""

    def __init__(self, out_features: int, device: torch.device) -> None:
        super().__init__()
        self.scale_O = nn.Parameter(torch.ones(out_features, device=device))

    def latents(self) -> list[nn.Parameter]:
        """Return none: signs and codes stay."""
        return []

    def factors(self) -> list[nn.Parameter]:
        """Return the scale."""
        return [self.scale_O]

    def hook(self, _layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        """Scale what the layer returned."""
        return output * self.scale_O.to(output.dtype)


@contextmanager
def scales_learning(model: PreTrainedModel) -> Iterator[dict[str, OutputScale]]:
    """Let every layer's output be scaled by a parameter that starts at 1; gone at the end."""
    layers = adapted_layers(model)
    scales = {name: OutputScale(layer.out_features, next(layer.buffers()).device) for name, layer in layers.items()}
    handles = [layer.register_forward_hook(scales[name].hook) for name, layer in layers.items()]
    try:
        yield scales
    finally:
        for handle in handles:
            handle.remove()


class AdapterSwitch:
    """Adapters of one model; `rows` says which row of the next forward takes which.

    Attributes:
        rows: int64 [T]; 0 for none, i for the i-th adapter of `names`, counted from 1. None: none is applied, which
            costs nothing.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.rows: Tensor | None = None
        self.names: list[str] = []
        self._device = device
        self._layers = adapted_layers(model)
        self._tables: dict[str, Tensor] = {}

    def add(self, name: str, scales: Mapping[str, Tensor]) -> None:
        """Take in an adapter.

        Args:
            name: of the adapter, not taken yet.
            scales: layer name to float [O].

        Raises:
            CorruptArtifact: not the scales of this model's layers.
        """
        wanted = {layer_name: layer.out_features for layer_name, layer in self._layers.items()}
        found = {layer_name: scale.numel() for layer_name, scale in scales.items()}
        if found != wanted:
            odd = min(layer_name for layer_name, _ in wanted.items() ^ found.items())
            raise CorruptArtifact(f"adapter {name}: not for the layers of this model; {odd} differs")
        for layer_name, layer in self._layers.items():
            fresh_1O = scales[layer_name].to(self._device, torch.float32)[None]
            if layer_name in self._tables:
                self._tables[layer_name] = torch.cat([self._tables[layer_name], fresh_1O])
            else:
                self._tables[layer_name] = torch.cat([torch.ones_like(fresh_1O), fresh_1O])
                layer.register_forward_hook(partial(self._scale, layer_name))
        self.names.append(name)

    @property
    def num_bytes(self) -> int:
        """Bytes of all scales."""
        return sum(table.nbytes for table in self._tables.values())

    def index(self, name: str) -> int:
        """Return the number of an adapter; 0 for the name ""."""
        return self.names.index(name) + 1 if name else 0

    def _scale(self, name: str, _layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        if self.rows is None:
            return None
        return (output.float() * self._tables[name][self.rows]).to(output.dtype)


def write_scales(folder: Path, scales: Mapping[str, Tensor]) -> str:
    """Write scales as float16; return the file's sha256.

    Raises:
        ArtifactError: the file cannot be written.
    """
    file = folder / SCALES_FILE
    try:
        save_file({name: scale.detach().to("cpu", torch.float16).contiguous() for name, scale in scales.items()}, file)
        return sha256(file.read_bytes()).hexdigest()
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: cannot be written ({first_line(error)})") from error


def read_scales(folder: str | Path, info: AdapterInfo) -> dict[str, Tensor]:
    """Read an adapter's scales.

    Args:
        folder: of the adapter.
        info: what it says about itself.

    Returns:
        Layer name to float16 [O].

    Raises:
        CorruptArtifact: the file is not the one that was written, or a scale is not finite.
    """
    file = Path(folder) / SCALES_FILE
    try:
        content = file.read_bytes()
        if sha256(content).hexdigest() != info.sha256:
            raise CorruptArtifact(f"{file}: not what was written (its sha256 differs from {info.sha256[:12]})")
        scales = load(content)
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{file}: cannot be read ({first_line(error)})") from error
    for name, scale in scales.items():
        if not scale.isfinite().all():
            raise CorruptArtifact(f"{file}: the scale of {name} is not finite")
    return scales

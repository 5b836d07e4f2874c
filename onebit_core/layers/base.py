"""QuantizedLinear: what every format shares - forward, bytes by part, and the choice of backend."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onebit_core.kernels import Backend, salient_matmul
from onebit_core.layers.salient import SalientPart
from onebit_core.layers.spec import LayerSpec


class QuantizedLinear(nn.Module, ABC):
    """y = x @ W.T + bias with a packed W.

    Stored tensors are buffers: their names, shapes and dtypes follow from the spec alone. `dequantize` gives the dense
    weight; `forward` agrees with it whichever backend computes.
    """

    PARTS: ClassVar[dict[str, str]]
    """Stored tensor name to its part (artifact.manifest.PARTS)."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.backend: Backend = "dense"
        self._dense: Tensor | None = None
        if spec.bias:
            self.register_buffer("bias", torch.empty(spec.out_features))
        self.salient = SalientPart(spec) if spec.salient else None

    def set_bias(self, bias_O: Tensor) -> None:
        """Store the original's bias, unquantized and in its own dtype."""
        self.spec = dataclasses.replace(self.spec, bias=True)
        self.register_buffer("bias", bias_O.detach().clone())

    @abstractmethod
    def base_weight(self) -> Tensor:
        """Return the dense weight without the salient part, float32 [O, I]."""

    @abstractmethod
    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply by the base weight through the packed op; [..., I] to [..., O], x's dtype."""

    def dequantize(self) -> Tensor:
        """Return the dense weight this layer stands for, float32 [O, I]."""
        weight_OI = self.base_weight()
        if self.salient is not None:
            rows, columns = self.salient.places()
            weight_OI[rows, columns] = self.salient.values(rows)
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x floating [..., I], result [..., O] in x's dtype."""
        bias = self._buffers.get("bias")
        if self.backend == "dense":
            return nn.functional.linear(x, self._dense_weight(x), None if bias is None else bias.to(x.dtype))
        result = self.base_matmul(x)
        if self.salient is not None:
            rows, columns = self.salient.places()
            delta = self.salient.values(rows) - self.base_weight()[rows, columns]
            result = result + salient_matmul(x, rows, columns, delta, self.out_features)
        return result if bias is None else result + bias.to(x.dtype)

    def stored_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield (name, part, tensor) of everything written to disk."""
        for name, tensor in self.named_buffers():
            yield name, self.part_of(name), tensor

    def part_of(self, name: str) -> str:
        """Return the part that a stored tensor counts to."""
        salient = {"codes": "salient", "scale": "scales", "zero": "scales"}
        if name.startswith("salient."):
            return salient.get(name.removeprefix("salient."), "index")
        return "full_precision" if name == "bias" else self.PARTS[name]

    def stored_bytes(self) -> int:
        """Return the bytes of all stored tensors but the bias (which no method quantizes)."""
        return sum(tensor.nbytes for name, _, tensor in self.stored_tensors() if name != "bias")

    def bits_per_weight(self) -> float:
        """Return stored bits per weight, scales and indices included."""
        return 8 * self.stored_bytes() / (self.in_features * self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer in a model's printout."""
        return f"{self.in_features} -> {self.out_features}, {self.bits_per_weight():.3f} bits, {self.backend}"

    def _dense_weight(self, x: Tensor) -> Tensor:
        """Return the dense weight in x's dtype on x's device, unpacked once."""
        if self._dense is None or self._dense.dtype != x.dtype or self._dense.device != x.device:
            self._dense = self.dequantize().to(x.dtype)
        return self._dense

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  (torch's signature)
        """Drop the unpacked weight when the module moves."""
        self._dense = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

"""QuantizedLinear: what every format shares - forward, bytes by part, and the choice of backend.

A packed backend lays the weight out once (`pack`). From then on the stored tensors are needed only to save or to
dequantize; a server that does neither drops them (`release_stored`), so that a weight is in memory once.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onebit_core.errors import BackendUnavailable
from onebit_core.kernels import (
    Backend,
    LinearOperands,
    Packed,
    PlaneTerm,
    packed_backend,
    packed_matmul,
    packs,
    salient_matmul,
)
from onebit_core.layers.salient import SalientPart
from onebit_core.layers.shared_input import SharedInput
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
        self._packed: tuple[Packed, ...] = ()
        self._shared: tuple[SharedInput, int] | None = None
        self.start: dict[str, Tensor] = {}
        """Continuous values behind what was decided, for reconstruction to start from; the pipeline drops them."""
        if spec.bias:
            self.register_buffer("bias", torch.empty(spec.out_features))
        self.salient = SalientPart(spec) if spec.salient else None

    def forget_start(self) -> None:
        """Drop what reconstruction started from, in the parts too."""
        for module in self.modules():
            if isinstance(module, QuantizedLinear):
                module.start = {}

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

    @abstractmethod
    def chain(self) -> tuple[LinearOperands, ...]:
        """Return the products that make up this layer, the first on x, in the form that packed kernels read.

        Empty for a layer whose parts are packed each on its own.
        """

    def product(self, terms: tuple[PlaneTerm, ...]) -> LinearOperands:
        """Return the one product of a layer whose base weight is a sum of planes, salient part and bias included."""
        product = LinearOperands(
            out_features=self.out_features,
            in_features=self.in_features,
            planes=terms,
            sparse=None if self.salient is None else self.salient.term(),
        )
        return self.with_bias(product)

    def with_bias(self, product: LinearOperands) -> LinearOperands:
        """Return a product with this layer's bias, if it has one, added."""
        bias = self._buffers.get("bias")
        return product if bias is None else dataclasses.replace(product, bias_O=bias.float())

    def pack(self) -> None:
        """Lay the weight out for a packed backend, ahead of the first product; nothing to do for the others."""
        if packs(self.backend) and not self._packed and self._shared is None:
            backend = packed_backend(self.backend)
            self._packed = tuple(backend.pack(product) for product in self.chain())

    def set_backend(self, backend: Backend) -> None:
        """Let another backend compute; what was laid out for the one before is dropped.

        Raises:
            BackendUnavailable: the stored tensors were released.
        """
        if backend == self.backend:
            return
        if any(buffer.is_meta for buffer in self.buffers()) and self._is_packed():
            raise BackendUnavailable(
                f"backend {backend!r}: the layer holds nothing but what was packed for {self.backend!r}; load it again"
            )
        self.backend = backend
        self._forget_copies()

    def _forget_copies(self) -> None:
        """Drop the unpacked and the packed weight; they are made again when needed."""
        self._dense, self._packed, self._shared = None, (), None

    def _is_packed(self) -> bool:
        return bool(self._packed) or self._shared is not None

    def share_input(self, shared: SharedInput, place: int) -> None:
        """Multiply together with the other linears that read the same input, from now on."""
        self._packed, self._shared = (), (shared, place)

    @property
    def shared_input(self) -> SharedInput | None:
        """The product that this layer is a part of, if it multiplies together with others."""
        return None if self._shared is None else self._shared[0]

    def products(self) -> tuple[Packed, ...]:
        """Return what a packed backend multiplies x with, one after the other, for callers that multiply themselves.

        Empty where that is not all: for a part of a shared product, and a layer whose parts multiply on their own.
        """
        if packs(self.backend) and self._shared is None:
            self.pack()
        return self._packed

    def packed_bytes(self) -> int:
        """Return the bytes of the weight as packed for a backend; a shared product counts at its first member."""
        if self._shared is not None:
            shared, place = self._shared
            return shared.num_bytes if place == 0 else 0
        return sum(packed.num_bytes for packed in self._packed)

    def release_stored(self) -> None:
        """Drop the stored tensors of a packed layer; it multiplies on, and can no longer be saved or dequantized."""
        self.pack()
        if not self._is_packed():
            return
        for module in self.modules():
            for name, tensor in list(module._buffers.items()):
                module._buffers[name] = None if tensor is None else tensor.to("meta")

    def dequantize(self) -> Tensor:
        """Return the dense weight this layer stands for, float32 [O, I]."""
        weight_OI = self.base_weight()
        if self.salient is not None:
            rows, columns = self.salient.places()
            weight_OI[rows, columns] = self.salient.values(rows)
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x floating [..., I], result [..., O] in x's dtype."""
        if packs(self.backend):
            if self._shared is not None:
                shared, place = self._shared
                return shared.product(x, place)
            self.pack()
            dtype = x.dtype
            if len(self._packed) > 1 and dtype == torch.float16:
                x = x.float()  # what is between two products may leave the range of float16
            for packed in self._packed:
                x = packed_matmul(x, packed)
            return x.to(dtype)
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
            # Kept for later, so that a pass with gradients can use it, too, whoever asks for it first.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._dense = self.dequantize().to(x.dtype)
        return self._dense

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  (torch's signature)
        """Drop what was made for the old device or dtype when the module moves."""
        self._forget_copies()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

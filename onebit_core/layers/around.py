"""AroundLinear: what layers that are one other layer, with something before or after it, have in common."""

from typing import ClassVar, Literal, Self

import torch
from torch import nn

from onebit_core.kernels import Backend, LinearOperands, packs
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.spec import LayerSpec
from onebit_core.layers.split import PART_FORMATS, SplitLinear


class AroundLinear(QuantizedLinear):
    """A layer around another, which is packed on its own.

    Tensors: those of the inner layer, as `parts.0.NAME`.
    """

    PARTS: ClassVar[dict[str, str]] = {}
    FORMAT: ClassVar[Literal["rotated", "normed"]]

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        (inner,) = spec.parts
        kinds: dict[str, type[QuantizedLinear]] = {**PART_FORMATS, "split": SplitLinear}
        self.parts = nn.ModuleList([kinds[inner.format](inner)])

    @classmethod
    def around(cls, layer: QuantizedLinear) -> Self:
        """Put a layer without a bias inside."""
        spec = LayerSpec(
            format=cls.FORMAT, in_features=layer.in_features, out_features=layer.out_features, parts=(layer.spec,)
        )
        with torch.device("meta"):
            outer = cls(spec)
        outer.parts = nn.ModuleList([layer])
        return outer

    @property
    def inner(self) -> QuantizedLinear:
        """The layer inside."""
        (layer,) = self.parts
        assert isinstance(layer, QuantizedLinear)
        return layer

    def chain(self) -> tuple[LinearOperands, ...]:
        """Return no product: the inner layer is packed on its own."""
        return ()

    def pack(self) -> None:
        """Lay the inner layer out for a packed backend."""
        if packs(self.backend):
            self.inner.pack()

    def release_stored(self) -> None:
        """Drop the inner layer's stored tensors; the bias stays, for it is used as it is."""
        self.inner.release_stored()

    def set_backend(self, backend: Backend) -> None:
        """Let another backend compute, in the inner layer too."""
        super().set_backend(backend)
        self.inner.set_backend(backend)

    def packed_bytes(self) -> int:
        """Return the bytes of the inner layer as packed."""
        return self.inner.packed_bytes()

    def part_of(self, name: str) -> str:
        """Return the part of the artifact that a stored tensor counts to."""
        prefix = "parts.0."
        return self.inner.part_of(name.removeprefix(prefix)) if name.startswith(prefix) else super().part_of(name)

    def _is_packed(self) -> bool:
        return self.inner._is_packed()

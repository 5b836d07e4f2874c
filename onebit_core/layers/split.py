"""SplitLinear: two kinds of input columns, each in a format of its own.

    y = A x[c] + B x[not c]          A, B: packed layers;  c: the columns whose bit is set in the index

Columns with large inputs, or whose loss costs most, deserve more bits, and a whole column costs next to no index: one
bit for all rows together. So store PTQ1.61 (arXiv:2502.13179: 4-bit columns beside signs), BiLLM
(arXiv:2402.04291, section 3.2: salient columns of two sign planes) and PB-LLM with whole columns (arXiv:2310.00034).

Both parts keep their columns in ascending order. Packed backends lay each part out on its own and read its columns of x
gathered; the sum of the parts is taken in float32.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from onebit_core.errors import CorruptArtifact
from onebit_core.kernels import Backend, LinearOperands, num_words, pack_bits, packs, unpack_bits
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.factor import FactorLinear
from onebit_core.layers.grouped_int import GroupedIntLinear
from onebit_core.layers.lut import LutLinear
from onebit_core.layers.sign import SignLinear
from onebit_core.layers.spec import LayerSpec

PART_FORMATS: dict[str, type[QuantizedLinear]] = {
    "sign": SignLinear,
    "grouped_int": GroupedIntLinear,
    "lut": LutLinear,
    "factor": FactorLinear,
}
"""Format name to layer class, of those that a part can have."""


class SplitLinear(QuantizedLinear):
    """Two layers side by side.

    Tensors: bitmap int32 [ceil(I / 32)], bit set where a column is of the first part; and those of the parts, as
    `parts.0.NAME` and `parts.1.NAME`.
    """

    PARTS: ClassVar[dict[str, str]] = {"bitmap": "index"}
    bitmap: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self._columns: tuple[Tensor, ...] | None = None
        self._packed_bias: Tensor | None = None
        self.register_buffer("bitmap", torch.empty(num_words(spec.in_features), dtype=torch.int32))
        self.parts = nn.ModuleList(PART_FORMATS[part.format](part) for part in spec.parts)

    @classmethod
    @torch.no_grad()
    def from_layers(cls, first_I: Tensor, layers: tuple[QuantizedLinear, QuantizedLinear]) -> "SplitLinear":
        """Put two layers side by side.

        Args:
            first_I: bool, set where a column is of the first layer.
            layers: of those columns in ascending order, and of the others; without bias.
        """
        spec = LayerSpec(
            format="split",
            in_features=first_I.numel(),
            out_features=layers[0].out_features,
            parts=tuple(layer.spec for layer in layers),
        )
        with first_I.device:
            split = cls(spec)
        split.bitmap.copy_(pack_bits(first_I))
        split.parts = nn.ModuleList(layers)
        split.check()
        return split

    @property
    def layers(self) -> tuple[QuantizedLinear, ...]:
        """The parts as what they are."""
        return tuple(part for part in self.parts if isinstance(part, QuantizedLinear))

    def columns(self) -> tuple[Tensor, ...]:
        """Return the columns of each part, int64, ascending; found once, so that a product does not wait for it."""
        if self._columns is None:
            first_I = unpack_bits(self.bitmap, self.in_features)
            self._columns = (first_I.nonzero()[:, 0], (~first_I).nonzero()[:, 0])
        return self._columns

    def check(self) -> None:
        """Refuse an index from a file that contradicts the parts.

        Raises:
            CorruptArtifact: it names more or fewer columns than the first part has, or one past the last.
        """
        bits = unpack_bits(self.bitmap, 32 * self.bitmap.numel())
        inside, outside = int(bits[: self.in_features].sum()), int(bits[self.in_features :].sum())
        if outside or inside != self.spec.parts[0].in_features:
            raise CorruptArtifact(
                f"the column index of a {self.out_features} x {self.in_features} matrix names {inside} columns and "
                f"{outside} outside of it for a part of {self.spec.parts[0].in_features}"
            )

    def base_weight(self) -> Tensor:
        """Return the dense weight of both parts, float32 [O, I]."""
        weight_OI = torch.empty(self.out_features, self.in_features, device=self.bitmap.device)
        for columns, layer in zip(self.columns(), self.layers, strict=True):
            weight_OI[:, columns] = layer.dequantize()
        return weight_OI

    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply each part by its columns of x and sum."""
        return self._sum(x).to(x.dtype)

    def _sum(self, x: Tensor) -> Tensor:
        """Return the sum of the parts, float32 [..., O].

        Parts on the CPU see x in float32, which their kernels compute in anyway; on a GPU in its own dtype, so that
        tensor cores multiply many tokens.
        """
        seen = x.float() if x.device.type == "cpu" else x
        shares = [
            layer(seen.index_select(-1, columns)).float()
            for columns, layer in zip(self.columns(), self.layers, strict=True)
        ]
        return torch.stack(shares).sum(0)

    def chain(self) -> tuple[LinearOperands, ...]:
        """Return no product: the parts are packed each on its own."""
        return ()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x floating [..., I], result [..., O] in x's dtype."""
        if not packs(self.backend):
            return super().forward(x)
        self.pack()
        result = self._sum(x)
        return (result if self._packed_bias is None else result + self._packed_bias).to(x.dtype)

    def pack(self) -> None:
        """Lay both parts out for a packed backend; columns and bias outlive the stored tensors."""
        if packs(self.backend) and not self._is_packed():
            self.columns()
            bias = self._buffers.get("bias")
            self._packed_bias = None if bias is None else bias.detach().float().clone()
            for layer in self.layers:
                layer.pack()

    def set_backend(self, backend: Backend) -> None:
        """Let another backend compute, in the parts too."""
        super().set_backend(backend)
        for layer in self.layers:
            layer.set_backend(backend)

    def packed_bytes(self) -> int:
        """Return the bytes of both parts as packed, of the columns they read and of the bias."""
        if not self._is_packed():
            return 0
        own = [*self.columns(), *([] if self._packed_bias is None else [self._packed_bias])]
        return sum(tensor.nbytes for tensor in own) + sum(layer.packed_bytes() for layer in self.layers)

    def part_of(self, name: str) -> str:
        """Return the part of the artifact that a stored tensor counts to."""
        if not name.startswith("parts."):
            return super().part_of(name)
        _, place, child = name.split(".", 2)
        return self.layers[int(place)].part_of(child)

    def _forget_copies(self) -> None:
        """Drop columns and bias too: they are on the device of before."""
        super()._forget_copies()
        self._columns = self._packed_bias = None

    def _is_packed(self) -> bool:
        return all(layer._is_packed() for layer in self.layers)

"""8-bit embedding and output head: in a small model they are most of the bytes.

    E_vd = s_v * q_vd,   q int8, s = max|E_v| / 127

A head tied to the embedding stores nothing and multiplies by the embedding's codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.kernels import Backend, Packed, byte_operands, packed_backend, packed_matmul, packs
from onebit_core.layers.grid import SMALLEST_SCALE


class QuantizedEmbedding(nn.Module):
    """An embedding table in 8 bit.

    Tensors: codes int8 [V, D]; scale float16 [V]. Looks up rows in the dtype that was torch's default when the module
    was made, or that the module was moved to.
    """

    codes: Tensor
    scale: Tensor
    dtype_probe: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("codes", torch.empty(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(num_embeddings, dtype=torch.float16))
        self.register_buffer("dtype_probe", torch.empty(0, dtype=torch.get_default_dtype()), persistent=False)

    @torch.no_grad()
    def fill(self, weight_VD: Tensor) -> None:
        """Quantize a table, floating [V, D], into this module."""
        scale_V = (weight_VD.float().abs().amax(1) / 127).clamp(min=SMALLEST_SCALE).half()
        self.scale.copy_(scale_V)
        self.codes.copy_((weight_VD.float() / scale_V.float()[:, None]).round().clamp(-127, 127))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: integer [...], result [..., D]."""
        rows = self.codes[ids].float() * self.scale[ids].float().unsqueeze(-1)
        return rows.to(self.dtype_probe.dtype)

    def dequantize(self) -> Tensor:
        """Return the dense table, float32 [V, D]."""
        return self.codes.float() * self.scale.float()[:, None]


class TiedHead(nn.Module):
    """The output head of a model whose head is its embedding: logits = x @ E.T; stores nothing."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that torch does not count its tensors twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.backend: Backend = "dense"
        self._dense: Tensor | None = None
        self._packed: Packed | None = None

    def set_backend(self, backend: Backend) -> None:
        """Let another backend compute; what was laid out for the one before is dropped."""
        if backend != self.backend:
            self.backend, self._dense, self._packed = backend, None, None

    def pack(self) -> None:
        """Lay the table out for a packed backend, ahead of the first product; nothing to do for the others."""
        if packs(self.backend) and self._packed is None:
            embedding = self._embedding[0]
            self._packed = packed_backend(self.backend).pack(byte_operands(embedding.codes, embedding.scale))

    def packed_bytes(self) -> int:
        """Return the bytes of the table as packed for a backend."""
        return 0 if self._packed is None else self._packed.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x floating [..., D], result [..., V] in x's dtype."""
        if packs(self.backend):
            self.pack()
            assert self._packed is not None
            return packed_matmul(x, self._packed)
        embedding = self._embedding[0]
        if self.backend == "reference":
            return ((x.float() @ embedding.codes.float().T) * embedding.scale.float()).to(x.dtype)
        if self._dense is None or self._dense.dtype != x.dtype or self._dense.device != x.device:
            self._dense = embedding.dequantize().to(x.dtype)
        return nn.functional.linear(x, self._dense)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  (torch's signature)
        """Drop what was made for the old device or dtype when the module moves."""
        self._dense = self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

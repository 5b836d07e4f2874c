"""SharedInput: linears that read the same input, multiplied in one product.

Query, key and value of a block multiply the same x, and so do gate and up. Their rows, one below the other, are one
weight: one call in place of three, and one preparation of x. Modelling code stays as it is: the first linear that is
called computes all rows and keeps the others' share until they ask with the same tensor.

    q_proj(x)   packed product [T, q + k + v] -> q's columns,  k's and v's wait
    k_proj(x)   same x: k's columns            v_proj(x)   same x: v's columns, nothing waits any more

A linear that is called with another x starts over, so calls in any order stay right. The same tensor means the same
values: x must not be changed in place between its linears, which no supported architecture does.
"""

from collections.abc import Sequence

from torch import Tensor

from onebit_core.kernels import Backend, LinearOperands, Packed, concatenate, packed_backend, packed_matmul


class SharedInput:
    """One product for several linears; see `join`."""

    def __init__(self, packed: Packed, rows: Sequence[int]) -> None:
        self._packed = packed
        self._rows = list(rows)
        self._x: Tensor | None = None
        self._waiting: list[Tensor | None] = []

    @classmethod
    def join(cls, members: Sequence[LinearOperands], backend: Backend) -> "SharedInput | None":
        """Pack weights of equal `in_features` as one, or return None where their structures differ."""
        joined = concatenate(members)
        if joined is None:
            return None
        return cls(packed_backend(backend).pack(joined), [member.out_features for member in members])

    def product(self, x: Tensor, place: int) -> Tensor:
        """Return the columns of the member at that place of the product with x."""
        share = self._waiting[place] if self._x is x else None
        if share is None:
            self._waiting = list(packed_matmul(x, self._packed).split(self._rows, dim=-1))
            self._x, share = x, self._waiting[place]
        assert share is not None
        self._waiting[place] = None
        if all(waiting is None for waiting in self._waiting):
            self._x = None
        return share

    @property
    def packed(self) -> Packed:
        """All rows, in the order of the members."""
        return self._packed

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self._packed.num_bytes

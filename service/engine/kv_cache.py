"""The memory behind the pages: keys and values of every layer.

    keys, values    [layers, 1 + num_pages, page_size, kv_heads, head_dim], page 0 is the null page (page_allocator)
    slot            page * page_size + position % page_size: where one token's keys lie

Everything a padded gather may read besides a sequence's own tokens must be finite, because attention gives it the
weight zero and zero times NaN is NaN: one sequence's NaN must not reach the next owner of its page. The null page is
never written; a page that a step begins but does not fill is zeroed first (`clear`).
"""

import torch
from torch import Tensor

from service.engine.page_allocator import NULL_PAGE


class KVCache:
    """Paged keys and values of all layers, on one device."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, NULL_PAGE + 1 + num_pages, page_size, num_kv_heads, head_dim)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._keys_by_slot = self._keys.view(num_layers, -1, num_kv_heads, head_dim)
        self._values_by_slot = self._values.view(num_layers, -1, num_kv_heads, head_dim)

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers, keys and values."""
        return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self._keys.nbytes + self._values.nbytes

    def clear(self, pages_P: Tensor) -> None:
        """Zero these pages in every layer. pages_P: int64."""
        self._keys.index_fill_(1, pages_P, 0)
        self._values.index_fill_(1, pages_P, 0)

    def write(self, layer: int, slots_T: Tensor, keys_THD: Tensor, values_THD: Tensor) -> None:
        """Store the keys and values of T tokens at their slots. slots_T: int64, distinct."""
        self._keys_by_slot[layer].index_copy_(0, slots_T, keys_THD)
        self._values_by_slot[layer].index_copy_(0, slots_T, values_THD)

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Gather pages: [..., P] int64 -> keys and values of shape [..., P, page_size, kv_heads, head_dim]."""
        keys = self._keys[layer].index_select(0, pages.flatten())
        values = self._values[layer].index_select(0, pages.flatten())
        return keys.view(*pages.shape, *keys.shape[1:]), values.view(*pages.shape, *values.shape[1:])

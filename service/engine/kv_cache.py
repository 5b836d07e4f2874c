"""The memory behind the pages: keys and values of every layer, in the model's dtype or in 8 bit.

    keys, values    [layers, 1 + num_pages, page_size, kv_heads, head_dim], page 0 is the null page (page_allocator)
    slot            page * page_size + position % page_size: where one token's keys lie

Everything a padded gather may read besides a sequence's own tokens must be finite, because attention gives it the
weight zero and zero times NaN is NaN: one sequence's NaN must not reach the next owner of its page. The null page is
never written; a page that a step begins but does not fill is zeroed first (`clear`).

**In 8 bit** a key or value x of one token and head is kept as

    codes = round(x R / scale) in -127..127,   scale = max |x R| / 127,   R = signs and a Hadamard matrix, orthogonal

and none is rotated back, since only products are needed: queries enter the same basis (`align`: (q R)(k R)^T = q k^T),
and what attention gives leaves it (`restore`: w (V R) R^T = w V). R spreads the few dimensions in which keys are large
over all, which is what 8 bits per token need: docs/engine.md has the KL divergences with and without.

Sources: rotated keys and values QuaRot (arXiv:2404.00456, section 4), scales per token WKVQuant (arXiv:2402.12065,
section 3). Where we differ: WKVQuant leaves the newest tokens unquantized. Here a token is read in 8 bit even in the
step that computes it, because otherwise what a query sees, and so the answer, would depend on how its prompt was cut
into chunks: on the company, on preemption, on what the prefix cache held. The same page of the docs has the price.
"""

import torch
from torch import Tensor

from onebit_core.layers.rotated import rotate, rotate_back
from service.engine.page_allocator import NULL_PAGE

LARGEST_CODE = 127


class KVCache:
    """Paged keys and values of all layers in the model's dtype, on one device."""

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
    def memory(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they lie, for kernels that go by addresses."""
        return self._keys, self._values

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

    def align(self, query_THD: Tensor) -> Tensor:
        """Bring queries into the basis of what `read` gives."""
        return query_THD

    def restore(self, output_THD: Tensor) -> Tensor:
        """Bring weighted sums of values that `read` gave back into the model's basis."""
        return output_THD


class FusedKVCache(KVCache):
    """The same memory in the order that fused blocks read and write by address.

    Inside of a page:

        keys      [kv_heads, head_dim, page_size]
        values    [kv_heads, page_size, head_dim]

    `memory` has the shape of KVCache's, which says nothing about the order. `write` and `read` are for steps that fused
    blocks cannot compute.
    """

    def __init__(self, cache: KVCache) -> None:
        """Take over a cache that holds nothing yet."""
        self._keys, self._values = cache._keys, cache._values
        self._page_size, heads, size = self._keys.shape[2:]
        self._keys_in_order = self._keys.view(*self._keys.shape[:2], heads, size, self._page_size)
        self._values_in_order = self._values.view(*self._values.shape[:2], heads, self._page_size, size)

    def write(self, layer: int, slots_T: Tensor, keys_THD: Tensor, values_THD: Tensor) -> None:
        """Store the keys and values of T tokens at their slots. slots_T: int64, distinct."""
        pages_T, places_T = slots_T // self._page_size, slots_T % self._page_size
        self._keys_in_order[layer][pages_T, :, :, places_T] = keys_THD
        self._values_in_order[layer][pages_T, :, places_T] = values_THD

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Gather pages: [..., P] int64 -> keys and values of shape [..., P, page_size, kv_heads, head_dim]."""
        keys = self._keys_in_order[layer].index_select(0, pages.flatten()).permute(0, 3, 1, 2)
        values = self._values_in_order[layer].index_select(0, pages.flatten()).permute(0, 2, 1, 3)
        return keys.reshape(*pages.shape, *keys.shape[1:]), values.reshape(*pages.shape, *values.shape[1:])


class Int8KVCache:
    """Paged keys and values of all layers in 8 bit, with the methods of KVCache but no memory in the model's dtype."""

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
        shape = (num_layers, NULL_PAGE + 1 + num_pages, page_size, num_kv_heads)
        self._dtype = dtype
        self._keys, self._values = (_Codes(shape, head_dim, device) for _ in range(2))

    @staticmethod
    def page_bytes(*, num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:  # noqa: ARG004  (8 bit whatever the model computes in)
        """Bytes of one page over all layers, keys and values, codes and scales."""
        return 2 * num_layers * page_size * num_kv_heads * (head_dim * torch.int8.itemsize + torch.float32.itemsize)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self._keys.num_bytes + self._values.num_bytes

    def clear(self, pages_P: Tensor) -> None:
        """Zero these pages in every layer. pages_P: int64."""
        self._keys.clear(pages_P)
        self._values.clear(pages_P)

    def write(self, layer: int, slots_T: Tensor, keys_THD: Tensor, values_THD: Tensor) -> None:
        """Store the keys and values of T tokens at their slots. slots_T: int64, distinct."""
        self._keys.write(layer, slots_T, rotate(keys_THD))
        self._values.write(layer, slots_T, rotate(values_THD))

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Gather pages: [..., P] int64 -> rotated keys and values [..., P, page_size, kv_heads, head_dim]."""
        return self._keys.read(layer, pages, self._dtype), self._values.read(layer, pages, self._dtype)

    def align(self, query_THD: Tensor) -> Tensor:
        """Bring queries into the basis of what `read` gives."""
        return rotate(query_THD)

    def restore(self, output_THD: Tensor) -> Tensor:
        """Bring weighted sums of values that `read` gave back into the model's basis."""
        return rotate_back(output_THD)


class _Codes:
    """Rows of numbers in 8 bit with a scale each: a token's keys, or values, of one head."""

    def __init__(self, shape: tuple[int, ...], head_dim: int, device: torch.device) -> None:
        num_layers, _, _, num_kv_heads = shape
        self._codes = torch.zeros(*shape, head_dim, dtype=torch.int8, device=device)
        self._scales = torch.zeros(*shape, 1, dtype=torch.float32, device=device)
        self._codes_by_slot = self._codes.view(num_layers, -1, num_kv_heads, head_dim)
        self._scales_by_slot = self._scales.view(num_layers, -1, num_kv_heads, 1)

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def clear(self, pages_P: Tensor) -> None:
        self._codes.index_fill_(1, pages_P, 0)
        self._scales.index_fill_(1, pages_P, 0)

    def write(self, layer: int, slots_T: Tensor, rows_THD: Tensor) -> None:
        """Quantize rows to their slots; a row with NaN or infinity reads as NaN."""
        rows_THD = rows_THD.float()
        scales_TH1 = rows_THD.abs().amax(-1, keepdim=True) / LARGEST_CODE
        codes_THD = (rows_THD / scales_TH1.clamp_min(torch.finfo(torch.float32).tiny)).round_().nan_to_num_()
        self._codes_by_slot[layer].index_copy_(0, slots_T, codes_THD.to(torch.int8))
        self._scales_by_slot[layer].index_copy_(0, slots_T, scales_TH1)

    def read(self, layer: int, pages: Tensor, dtype: torch.dtype) -> Tensor:
        codes = self._codes[layer].index_select(0, pages.flatten())
        scales = self._scales[layer].index_select(0, pages.flatten())
        return (codes.to(dtype) * scales.to(dtype)).view(*pages.shape, *codes.shape[1:])


AnyKVCache = KVCache | Int8KVCache

KV_CACHES: dict[str, type[AnyKVCache]] = {"auto": KVCache, "int8": Int8KVCache}
"""By EngineConfig.kv_cache_dtype."""

"""Paged attention, plugged into transformers' own models through AttentionInterface.

The model's modelling code computes queries, keys and values (positions already applied) for the step's T tokens in one
row, and calls `paged_attention` where it would call its attention. The step's tensors arrive as the keyword argument
`paged`, which the models hand down from the call of the runner. No mask function is registered under our name, which
is how transformers is told to build no mask (`masking_utils._preprocess_mask_arguments`).

    write       keys and values of all T tokens to their slots
    decode      rows of one token: gather pages, and attend in one call per group; query heads that share a key head
                are folded into the query axis, so keys are never repeated
    prefill     one call per chunk over its own sequence's pages

Sliding windows, soft caps and attention sinks are not computed here: `model_shape` refuses or shortens such models.

Legend: T tokens of the step, H query heads, K key heads, G = H / K, D head size, B rows, P pages, S keys.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from service.engine.batch import Batch, DecodeGroup, PrefillPart
from service.engine.kv_cache import KVCache

PAGED_ATTENTION = "onebit_paged"


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedStep:
    """What every layer's attention needs to know of the step."""

    cache: KVCache
    batch: Batch


def paged_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    _attention_mask: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    """Write the step's keys and values to the cache and attend over the pages.

    Args:
        module: the attention module; its `layer_idx` names the layer.
        query_1HTD: queries, positions applied.
        key_1KTD: keys, positions applied.
        value_1KTD: values.
        paged: the step.
        scaling: of the scores; None is 1 / sqrt(D).

    Returns:
        [1, T, H, D] as transformers wants it, and no weights.
    """
    cache, batch, layer = paged.cache, paged.batch, int(module.layer_idx)  # type: ignore[arg-type]
    query_THD = query_1HTD[0].transpose(0, 1)
    cache.write(layer, batch.slots_T, key_1KTD[0].transpose(0, 1), value_1KTD[0].transpose(0, 1))
    if len(batch.decode_groups) == 1 and not batch.prefill_parts:
        return _decode(query_THD, batch.decode_groups[0], cache, layer, scaling)[None], None
    output_THD = query_THD.new_empty(*query_THD.shape[:2], value_1KTD.shape[-1])
    for group in batch.decode_groups:
        rows = slice(group.first, group.last)
        output_THD[rows] = _decode(query_THD[rows], group, cache, layer, scaling)
    for part in batch.prefill_parts:
        rows = slice(part.first, part.last)
        output_THD[rows] = _prefill(query_THD[rows], part, cache, layer, scaling)
    return output_THD[None], None


def _decode(query_BHD: Tensor, group: DecodeGroup, cache: KVCache, layer: int, scaling: float | None) -> Tensor:
    """Attend one query per row over the row's pages; returns [B, H, D]."""
    keys_BPskD, values_BPskD = cache.read(layer, group.pages_BP)
    keys_BKSD = keys_BPskD.flatten(1, 2).transpose(1, 2)
    values_BKSD = values_BPskD.flatten(1, 2).transpose(1, 2)
    query_BKGD = query_BHD.unflatten(1, (keys_BKSD.shape[1], -1))
    output_BKGD = F.scaled_dot_product_attention(
        query_BKGD, keys_BKSD, values_BKSD, attn_mask=group.mask_B11S, scale=scaling
    )
    return output_BKGD.flatten(1, 2)


def _prefill(query_THD: Tensor, part: PrefillPart, cache: KVCache, layer: int, scaling: float | None) -> Tensor:
    """Attend a chunk of one sequence over everything up to its own end; returns [T, H, D]."""
    keys_PskD, values_PskD = cache.read(layer, part.pages_P)
    keys_1KSD = keys_PskD.flatten(0, 1)[: part.num_keys].transpose(0, 1)[None]
    values_1KSD = values_PskD.flatten(0, 1)[: part.num_keys].transpose(0, 1)[None]
    output_1HTD = F.scaled_dot_product_attention(
        query_THD.transpose(0, 1)[None],
        keys_1KSD,
        values_1KSD,
        attn_mask=part.mask_TS,
        is_causal=part.mask_TS is None,
        scale=scaling,
        enable_gqa=True,
    )
    return output_1HTD[0].transpose(0, 1)


def register() -> None:
    """Make the name known to transformers; registering twice is harmless."""
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)

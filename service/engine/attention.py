"""Paged attention, plugged into transformers' own models through AttentionInterface.

The model's modelling code computes queries, keys and values (positions already applied) for the step's T tokens in one
row, and calls `paged_attention` where it would call its attention. The step's tensors arrive as the keyword argument
`paged`, which the models hand down from the call of the runner. No mask function is registered under our name, which
is how transformers is told to build no mask (`masking_utils._preprocess_mask_arguments`).

    write       keys and values of all T tokens to their slots
    decode      rows of one token: gather pages, and attend in one call per group; query heads that share a key head
                are folded into the query axis, so keys are never repeated; where the batch comes without masks, a
                kernel reads the pages where they lie (`reads_pages`)
    prefill     one call per chunk over its own sequence's pages

A layer with a sliding window attends over the batch's groups and parts of that window. Layers that bend their scores
take a path of plain matrix products, because scaled_dot_product_attention cannot:

    soft cap    c * tanh(scores / c)                       Gemma 2 (arXiv:2408.00118, section 2)
    sink        one more score per head, with no value     gpt-oss; it takes its share of the softmax

Legend: T tokens of the step, H query heads, K key heads, G = H / K, D head size, B rows, P pages, S keys.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from service.engine.batch import Batch, DecodeGroup, PrefillPart
from service.engine.kv_cache import AnyKVCache, KVCache

PAGED_ATTENTION = "onebit_paged"
MOST_SCORES = 1 << 24
"""Scores held at once where they are computed one by one: 64 MiB of float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedStep:
    """What every layer's attention needs to know of the step."""

    cache: AnyKVCache
    batch: Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights.

    Attributes:
        scale: of the scores; None is 1 / sqrt(D).
        softcap: no score goes beyond it; None for no cap.
        sinks_H: a score per query head that takes part in the softmax and has no value; None for none.
        window: how many tokens back a query looks; None for all.
    """

    scale: float | None
    softcap: float | None
    sinks_H: Tensor | None
    window: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether scaled_dot_product_attention computes it."""
        return self.softcap is None and self.sinks_H is None


def paged_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    _attention_mask: Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Write the step's keys and values to the cache and attend over the pages.

    Args:
        module: the attention module; its `layer_idx` names the layer.
        query_1HTD: queries, positions applied.
        key_1KTD: keys, positions applied.
        value_1KTD: values.
        paged: the step.
        scaling: of the scores; None is 1 / sqrt(D).
        **options: `sliding_window`, how many tokens back a query looks, its own included; `softcap`, the limit of the
            scores; `s_aux` [H], attention sinks. None is none; the rest has no meaning here.

    Returns:
        [1, T, H, D] as transformers wants it, and no weights.
    """
    cache, batch, layer = paged.cache, paged.batch, int(module.layer_idx)  # type: ignore[arg-type]
    window = options.get("sliding_window")
    reach = batch if window is None else batch.windowed[window]
    scoring = Scoring(scale=scaling, softcap=options.get("softcap"), sinks_H=options.get("s_aux"), window=window)
    query_THD = cache.align(query_1HTD[0].transpose(0, 1))
    cache.write(layer, batch.slots_T, key_1KTD[0].transpose(0, 1), value_1KTD[0].transpose(0, 1))
    if len(reach.decode_groups) == 1 and not reach.prefill_parts:
        return cache.restore(_decode(query_THD, reach.decode_groups[0], cache, layer, scoring))[None], None
    output_THD = query_THD.new_empty(*query_THD.shape[:2], value_1KTD.shape[-1])
    for group in reach.decode_groups:
        rows = slice(group.first, group.last)
        output_THD[rows] = _decode(query_THD[rows], group, cache, layer, scoring)
    for part in reach.prefill_parts:
        rows = slice(part.first, part.last)
        output_THD[rows] = _prefill(query_THD[rows], part, cache, layer, scoring)
    return cache.restore(output_THD)[None], None


def _decode(query_BHD: Tensor, group: DecodeGroup, cache: AnyKVCache, layer: int, scoring: Scoring) -> Tensor:
    """Attend one query per row over the row's pages; returns [B, H, D]."""
    if group.mask_B11S is None:
        read_pages = _page_reader()
        assert read_pages is not None, "reads_pages has found it"
        keys, values = cache.memory  # type: ignore[union-attr]  # reads_pages has looked at its kind
        return read_pages(
            query_BHD,
            keys[layer],
            values[layer],
            group.pages_BP,
            group.lengths_B,
            scale=query_BHD.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale,
            softcap=scoring.softcap,
            window=scoring.window,
            most_keys=group.most_keys,
        )
    keys_BPskD, values_BPskD = cache.read(layer, group.pages_BP)
    keys_BKSD = keys_BPskD.flatten(1, 2).transpose(1, 2)
    values_BKSD = values_BPskD.flatten(1, 2).transpose(1, 2)
    query_BKGD = query_BHD.unflatten(1, (keys_BKSD.shape[1], -1))
    if not scoring.is_plain:
        query_BKGTD = query_BKGD[:, :, :, None]
        return _bent(query_BKGTD, keys_BKSD, values_BKSD, group.mask_B11S[:, :, None], scoring)[:, :, :, 0].flatten(
            1, 2
        )
    output_BKGD = F.scaled_dot_product_attention(
        query_BKGD, keys_BKSD, values_BKSD, attn_mask=group.mask_B11S, scale=scoring.scale
    )
    return output_BKGD.flatten(1, 2)


def reads_pages(device: torch.device, cache: AnyKVCache, *, has_sinks: bool) -> bool:
    """Whether a kernel reads the cache's pages where they lie: on a GPU with Triton, and under its interpreter."""
    triton = sys.modules.get("triton")  # who runs its interpreter has imported it; nobody else on a CPU should
    runs_kernels = device.type == "cuda" or (triton is not None and triton.knobs.runtime.interpret)
    return runs_kernels and isinstance(cache, KVCache) and not has_sinks and _page_reader() is not None


@functools.cache
def _page_reader() -> Callable[..., Tensor] | None:
    """Return the kernel that reads pages where they lie; None without Triton, which is not imported before."""
    try:
        from onebit_core.kernels.triton.paged_attention import paged_decode
    except ImportError:
        return None
    return paged_decode


def _prefill(query_THD: Tensor, part: PrefillPart, cache: AnyKVCache, layer: int, scoring: Scoring) -> Tensor:
    """Attend a chunk of one sequence over everything up to its own end; returns [T, H, D]."""
    keys_PskD, values_PskD = cache.read(layer, part.pages_P)
    keys_1KSD = keys_PskD.flatten(0, 1)[: part.num_keys].transpose(0, 1)[None]
    values_1KSD = values_PskD.flatten(0, 1)[: part.num_keys].transpose(0, 1)[None]
    query_1HTD = query_THD.transpose(0, 1)[None]
    if not scoring.is_plain:
        query_1KGTD = query_1HTD.unflatten(1, (keys_1KSD.shape[1], -1))
        mask_TS = _causal(query_THD, part.num_keys) if part.mask_TS is None else part.mask_TS
        output_1HTD = _bent_in_parts(query_1KGTD, keys_1KSD, values_1KSD, mask_TS, scoring).flatten(1, 2)
    else:
        output_1HTD = F.scaled_dot_product_attention(
            query_1HTD,
            keys_1KSD,
            values_1KSD,
            attn_mask=part.mask_TS,
            is_causal=part.mask_TS is None,
            scale=scoring.scale,
            enable_gqa=True,
        )
    return output_1HTD[0].transpose(0, 1)


def _causal(query_THD: Tensor, num_keys: int) -> Tensor:
    """Return the additive mask [T, S] of a chunk that begins at the first key."""
    return query_THD.new_full((query_THD.shape[0], num_keys), float("-inf")).triu(1)


def _bent_in_parts(
    query_1KGTD: Tensor, keys_1KSD: Tensor, values_1KSD: Tensor, mask_TS: Tensor, scoring: Scoring
) -> Tensor:
    """Attend a long chunk a few queries at a time, so that scores never take more than MOST_SCORES."""
    _, num_kv_heads, group, _, _ = query_1KGTD.shape
    rows = max(1, MOST_SCORES // (num_kv_heads * group * keys_1KSD.shape[2]))
    parts = zip(query_1KGTD.split(rows, dim=3), mask_TS.split(rows), strict=True)
    return torch.cat([_bent(query, keys_1KSD, values_1KSD, mask, scoring) for query, mask in parts], dim=3)


def _bent(query_BKGTD: Tensor, keys_BKSD: Tensor, values_BKSD: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attend with a soft cap or sinks, softmax in float32.

    Args:
        query_BKGTD: query heads by the key head they share.
        keys_BKSD: keys.
        values_BKSD: values.
        mask: additive, broadcast to [B, K, G, T, S].
        scoring: how scores are bent.

    Returns:
        [B, K, G, T, D].
    """
    num_kv_heads, group = query_BKGTD.shape[1:3]
    scale = query_BKGTD.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores_BKQS = (query_BKGTD.flatten(2, 3) @ keys_BKSD.transpose(2, 3)) * scale
    scores_BKGTS = scores_BKQS.unflatten(2, (group, -1))
    if scoring.softcap is not None:
        scores_BKGTS = torch.tanh(scores_BKGTS / scoring.softcap) * scoring.softcap
    scores_BKGTS = (scores_BKGTS + mask).float()
    if scoring.sinks_H is not None:
        sinks_KG11 = scoring.sinks_H.float().view(num_kv_heads, group, 1, 1)
        sinks_BKGT1 = sinks_KG11.expand(*scores_BKGTS.shape[:-1], 1)
        weights_BKGTS = torch.cat([scores_BKGTS, sinks_BKGT1], dim=-1).softmax(-1)[..., :-1]
    else:
        weights_BKGTS = scores_BKGTS.softmax(-1)
    weights_BKQS = weights_BKGTS.to(values_BKSD.dtype).flatten(2, 3)
    output_BKGTD: Tensor = (weights_BKQS @ values_BKSD).unflatten(2, (group, -1))
    return output_BKGTD


def register() -> None:
    """Make the name known to transformers; registering twice is harmless."""
    AttentionInterface.register(PAGED_ATTENTION, paged_attention)

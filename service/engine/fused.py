"""The decoder blocks of Llama-like models in one call of the CPU kernels, in place of transformers' modules.

    embed_tokens, rotary_emb    transformers' own, once a step
    all blocks, last norm       onebit_core.kernels.cpu.decoder: norms, packed products, rotation, paged attention
    lm_head                     the model's own module, on the rows that are wanted

Eager modules of a block cost a third of a millisecond in overhead, which is more than their work where one token is
decoded. A model qualifies if it is of a family whose blocks are exactly those (`FAMILIES`), computes in float32 on the
CPU, and all its linears are packed for the CPU kernels; any other keeps transformers' modules. The runner's self check
compares the logits with the untouched model's before the first request either way.

The cache's memory is the same, with another order inside of a page (kv_cache.FusedKVCache): keys of sixteen tokens lie
side by side.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from onebit_core.errors import BackendUnavailable, KernelError
from onebit_core.kernels.cpu.decoder import PAGE_TOKENS, Chain, CpuDecoder, DecoderBlock, DecoderShape
from onebit_core.layers import QuantizedLinear
from service.engine.batch import Batch
from service.engine.kv_cache import FusedKVCache

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""RMSNorm before attention and inner part, rotated halves, grouped heads, silu(gate) * up."""


class NotFusable(Exception):
    """The model keeps transformers' blocks; the text says why."""


class FusedBlocks:
    """The blocks of a model as one function.

    Raises:
        NotFusable: the model's blocks are not of this kind, or not packed for the CPU.
    """

    def __init__(self, model: PreTrainedModel, page_size: int) -> None:
        inner: Any = model.base_model
        _check(model, page_size)
        self._embed, self._rotary = inner.embed_tokens, inner.rotary_emb
        first: Any = inner.layers[0].self_attn
        config = model.config
        try:
            self._decoder = CpuDecoder(
                DecoderShape(
                    hidden=config.hidden_size,
                    heads=config.num_attention_heads,
                    key_heads=config.num_key_value_heads,
                    head_dim=first.head_dim,
                    inner=config.intermediate_size,
                    eps=config.rms_norm_eps,
                    scaling=first.scaling,
                ),
                [_block(block) for block in inner.layers],
                inner.norm.weight,
            )
        except (KernelError, BackendUnavailable) as error:
            raise NotFusable(str(error)) from None

    def hidden(self, batch: Batch, cache: FusedKVCache, rows_R: Tensor) -> Tensor:
        """Compute a step; returns the normalized last hidden states of some rows, float32 [R, D]."""
        assert batch.runs is not None
        embedded_1TD: Tensor = self._embed(batch.input_ids_1T)
        cos_1TR, sin_1TR = self._rotary(embedded_1TD, position_ids=batch.position_ids_1T)
        return self._decoder.step(
            embedded_1TD[0].float().contiguous(),
            (cos_1TR[0], sin_1TR[0]),
            cache.memory,
            slots_T=batch.slots_T.numpy(),
            runs_N4=batch.runs.runs_N4,
            pages_P=batch.runs.pages_P,
            rows=rows_R.numpy(),
        )


def _check(model: PreTrainedModel, page_size: int) -> None:
    """Raise what keeps a model from being fused."""
    config = model.config
    if type(model).__name__ not in FAMILIES:
        raise NotFusable(f"{type(model).__name__} is not of a family whose blocks are fused")
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise NotFusable(f"blocks are fused on the CPU in float32, not on {model.device.type} in {model.dtype}")
    if page_size != PAGE_TOKENS:
        raise NotFusable(f"blocks are fused with pages of {PAGE_TOKENS} tokens, not {page_size}")
    if config.hidden_act not in ("silu", "swish"):
        raise NotFusable(f"activation {config.hidden_act} is not silu")


def _block(block: Any) -> DecoderBlock:
    attention, mlp = block.self_attn, block.mlp
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return DecoderBlock(
        input_norm_D=block.input_layernorm.weight,
        post_norm_D=block.post_attention_layernorm.weight,
        q_norm_R=None if q_norm is None else q_norm.weight,
        k_norm_R=None if k_norm is None else k_norm.weight,
        window=_window(attention),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        o=_chain(attention.o_proj),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_chain(mlp.down_proj),
    )


def _window(attention: Any) -> int | None:
    """Return how far back a layer looks: what its module says, or, as in Mistral, the configuration for all layers."""
    config = attention.config
    window = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    return None if window is None else int(window)


def _joined(*linears: Any) -> tuple[Chain, ...]:
    """Return the one product of linears that are multiplied together, or a chain for each."""
    shared = getattr(linears[0], "shared_input", None)
    if shared is not None and all(linear.shared_input is shared for linear in linears):
        return ((shared.packed,),)
    return tuple(_chain(linear) for linear in linears)


def _chain(linear: Any) -> Chain:
    chain = linear.products() if isinstance(linear, QuantizedLinear) else ()
    if not chain:
        raise NotFusable("not every linear is one product, or one after another, of a packed backend")
    return chain

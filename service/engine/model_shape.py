"""What the engine must know of a model before it can page its keys: asked of the model itself, not of its config.

Config fields for head counts and sizes are named differently in every architecture. So a short forward runs with an
attention function that records what each layer hands to it: shape and dtype of the keys, its sliding window, and
whether it asks for something paged attention does not compute (a position bias).

A rotary embedding that changes with length is exact as long as no sequence grows past it, so it becomes a limit on the
context, with a note, and not a refusal.

The self check of `runner` has only a few tokens, which no real window hides and no real soft cap bends. `exposed` sets
both so small, for as long as it is entered, that a paged attention that ignored them would be seen.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from service.errors import EngineStartFailed

_RECORDING = "onebit_recording"
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
PROBE_TOKENS = tuple(range(1, 13))
EXPOSED = {"sliding_window": 5, "attn_logit_softcapping": 0.25}
"""What a window and a soft cap are in the self check, where a model has one; the names are those of its config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of the keys and values, and how long a sequence may grow.

    Attributes:
        num_layers: attention layers.
        num_heads: query heads of each.
        num_kv_heads: key heads of each.
        head_dim: size of a key and of a value.
        dtype: of keys and values.
        max_positions: longest sequence the model computes exactly; None when it does not say.
        limited_by: what set max_positions, in words.
        windows: distinct sliding windows of its layers, in tokens, the query's own included.
        exposed_windows: the same while `exposed` is entered.
        has_sinks: whether a layer has attention sinks.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_positions: int | None
    limited_by: str
    windows: tuple[int, ...] = ()
    exposed_windows: tuple[int, ...] = ()
    has_sinks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What one layer handed to attention."""

    layer: int
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    sliding_window: int | None
    has_sinks: bool
    unsupported: tuple[str, ...]


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Run a short forward and read the shape off it.

    Raises:
        EngineStartFailed: the model does not call AttentionInterface, its layers differ in shape, or they ask for
            something paged attention does not compute.
    """
    calls = _record(model)
    name = type(model).__name__
    if not calls:
        raise EngineStartFailed(
            f"{name} does not compute attention through transformers' AttentionInterface, so its keys cannot be paged"
        )
    unsupported = sorted({feature for call in calls for feature in call.unsupported})
    if unsupported:
        raise EngineStartFailed(f"{name} asks attention for {', '.join(unsupported)}, which is not supported")
    shapes = {(call.num_heads, call.num_kv_heads, call.key_dim, call.value_dim, call.dtype) for call in calls}
    if len(shapes) != 1 or calls[0].key_dim != calls[0].value_dim:
        raise EngineStartFailed(f"{name} has attention layers of different shapes, which is not supported")
    if sorted(call.layer for call in calls) != list(range(len(calls))):
        raise EngineStartFailed(f"{name} does not number its attention layers 0, 1, 2, ...")
    max_positions, limited_by = _longest(model)
    windows = _windows(calls)
    with exposed(model):
        exposed_windows = _windows(_record(model)) if windows else ()
    return ModelShape(
        num_layers=len(calls),
        num_heads=calls[0].num_heads,
        num_kv_heads=calls[0].num_kv_heads,
        head_dim=calls[0].key_dim,
        dtype=calls[0].dtype,
        max_positions=max_positions,
        limited_by=limited_by,
        windows=windows,
        exposed_windows=exposed_windows,
        has_sinks=any(call.has_sinks for call in calls),
    )


@contextmanager
def exposed(model: PreTrainedModel) -> Iterator[None]:
    """Make sliding windows and soft caps of the model small, and set them back in the end.

    Modelling code takes them from the config or from a copy in the attention modules, so both are changed.
    """
    with ExitStack() as restore:
        for holder in (model.config.get_text_config(), *model.modules()):
            for name, value in EXPOSED.items():
                before = vars(holder).get(name)
                if isinstance(before, int | float) and before > value:
                    setattr(holder, name, value)
                    restore.callback(setattr, holder, name, before)
        yield


def _windows(calls: list[_Call]) -> tuple[int, ...]:
    return tuple(sorted({call.sliding_window for call in calls if call.sliding_window is not None}))


@torch.inference_mode()
def _record(model: PreTrainedModel) -> list[_Call]:
    """Return what each layer hands to attention in a forward of a few tokens."""
    calls: list[_Call] = []

    def recording(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: object
    ) -> tuple[Tensor, None]:
        calls.append(_describe(module, query, key, value, options))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2), None

    before = model.config._attn_implementation
    AttentionInterface.register(_RECORDING, recording)
    model.set_attn_implementation(_RECORDING)
    model(input_ids=torch.tensor([PROBE_TOKENS], device=model.device), use_cache=False)
    model.set_attn_implementation(before)
    return calls


def _describe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, object]) -> _Call:
    window = options.get("sliding_window")
    features = {"position_bias": "a position bias"}
    return _Call(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_dim=key.shape[-1],
        value_dim=value.shape[-1],
        dtype=key.dtype,
        sliding_window=window if isinstance(window, int) else None,
        has_sinks=options.get("s_aux") is not None,
        unsupported=tuple(words for name, words in features.items() if options.get(name) is not None),
    )


def _longest(model: PreTrainedModel) -> tuple[int | None, str]:
    """Return the longest sequence the model computes exactly, and what limits it."""
    config = model.config.get_text_config()
    limits: list[tuple[int, str]] = []
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        limits.append((int(positions), "the model's max_position_embeddings"))
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            trained = rope.get("original_max_position_embeddings") or positions
            limits += [(int(trained), "the length up to which the rotary embedding is fixed")] if trained else []
    return min(limits) if limits else (None, "")


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotary embeddings' parameters: one, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(each for each in parameters.values() if isinstance(each, dict))]

"""How many pages the pool has, and how long a sequence may grow: arithmetic on sizes, no tensors made.

    num_pages      = kv_cache_bytes / bytes of a page, but no more than max_num_sequences of full length could use
    max_model_len  = what was asked for; by default what the model allows, shortened to what the pool can hold

One sequence of max_model_len must fit the pool alone: the scheduler's promise that the oldest sequence always
progresses rests on it.
"""

from dataclasses import dataclass

from service.engine.kv_cache import KV_CACHES
from service.engine.model_shape import ModelShape
from service.engine.types import EngineConfig
from service.errors import EngineStartFailed


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """The pool and the context it allows; a note for everything that was shortened."""

    num_pages: int
    max_model_len: int
    notes: tuple[str, ...]


def plan_capacity(shape: ModelShape, config: EngineConfig) -> Capacity:
    """Fit pool and context to the configuration.

    Raises:
        EngineStartFailed: the asked context is longer than the model's or than the pool, the pool holds less than
            a page, or nobody says how long a sequence may be.
    """
    page_bytes = KV_CACHES[config.kv_cache_dtype].page_bytes(
        num_layers=shape.num_layers,
        page_size=config.page_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
    )
    affordable = config.kv_cache_bytes // page_bytes
    if affordable < 1:
        raise EngineStartFailed(
            f"kv_cache_bytes={config.kv_cache_bytes} holds no page: one page of {config.page_size} tokens takes "
            f"{page_bytes} bytes; raise kv_cache_bytes"
        )
    max_model_len, notes = _context(shape, config, affordable * config.page_size)
    useful = config.max_num_sequences * -(-max_model_len // config.page_size)
    return Capacity(num_pages=min(affordable, useful), max_model_len=max_model_len, notes=notes)


def _context(shape: ModelShape, config: EngineConfig, pool_tokens: int) -> tuple[int, tuple[str, ...]]:
    asked, longest = config.max_model_len, shape.max_positions
    if asked is not None:
        if longest is not None and asked > longest:
            raise EngineStartFailed(
                f"max_model_len={asked} is over {longest}, {shape.limited_by}; ask for at most that"
            )
        if asked > pool_tokens:
            raise EngineStartFailed(
                f"max_model_len={asked} does not fit the KV cache: kv_cache_bytes={config.kv_cache_bytes} holds "
                f"{pool_tokens} tokens; raise kv_cache_bytes or lower max_model_len"
            )
        return asked, ()
    if longest is None:
        raise EngineStartFailed("the model does not say how long a sequence may be; set max_model_len")
    notes = []
    if "max_position_embeddings" not in shape.limited_by:
        notes.append(f"context limited to {longest} tokens by {shape.limited_by}")
    if longest > pool_tokens:
        notes.append(
            f"context shortened from {longest} to {pool_tokens} tokens, which is what "
            f"kv_cache_bytes={config.kv_cache_bytes} holds"
        )
    return min(longest, pool_tokens), tuple(notes)

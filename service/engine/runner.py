"""One forward of a mixed batch through transformers' own model code.

    step's chunks -> build_batch -> model(input_ids [1, T], position_ids, paged=...) -> logits of the rows that draw

The model sees one row of T tokens from many sequences; only attention knows where one ends and the next begins.
Before the first request, and after any step that failed, `self_check` runs a few tokens through the paged path in every
shape it has (first chunk, later chunk, single tokens) and compares with the logits of the untouched model, so an
architecture that would be computed wrongly is refused at the start, and a broken device is noticed at once.
"""

import inspect
import logging
from array import array

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onebit_core.adapters.scales import AdapterSwitch
from onebit_core.layers import model_backend, packed_bytes
from service.engine.attention import PAGED_ATTENTION, PagedStep, reads_pages, register
from service.engine.batch import Batch, adapted, build_batch, with_adapters
from service.engine.capacity import Capacity, plan_capacity
from service.engine.fused import FusedBlocks, NotFusable
from service.engine.graphs import DecodeGraphs, Limits, Outputs
from service.engine.kv_cache import KV_CACHES, AnyKVCache, FusedKVCache, KVCache
from service.engine.model_shape import PROBE_TOKENS, ModelShape, exposed, model_shape
from service.engine.scheduler import Chunk
from service.engine.sequence import Sequence
from service.engine.types import EngineConfig, GenerationRequest, SamplingParams
from service.errors import EngineStartFailed

log = logging.getLogger(__name__)

CHECK_CHUNKS = (7, 3, 1, 1)  # lengths: a first chunk, a later chunk, two single tokens
CHECK_TOLERANCE = 0.1  # relative; bfloat16 noise is near 0.02, a wrong attention near 1


class Runner:
    """A loaded model, its KV cache, and the forward that joins them."""

    def __init__(self, model: PreTrainedModel, config: EngineConfig, adapters: AdapterSwitch | None = None) -> None:
        """Prepare a model.

        Args:
            model: on its device, in evaluation mode.
            config: of the engine.
            adapters: of this model; None for none.

        Raises:
            EngineStartFailed: it cannot be served with this configuration.
        """
        self._switch = adapters
        self._adapters = {} if adapters is None else {name: adapters.index(name) for name in adapters.names}
        shape = model_shape(model)
        self.capacity: Capacity = plan_capacity(shape, config)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = shape.dtype
        self._model = model
        self._head_input: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._see_head_input)
        self._page_size = config.page_size
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._check_pages = -(-len(PROBE_TOKENS) // config.page_size)
        self._windows, self._exposed_windows = shape.windows, shape.exposed_windows
        with exposed(model):
            self._expected_CV = self._plain_logits()
        self._cache: AnyKVCache = KV_CACHES[config.kv_cache_dtype](
            num_layers=shape.num_layers,
            # After those of sequences come those of the self check, and one for rows that only fill a recorded step.
            num_pages=self.capacity.num_pages + self._check_pages + 1,
            page_size=config.page_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
            device=model.device,
        )
        register()
        model.set_attn_implementation(PAGED_ATTENTION)
        self._fused = self._fuse(config)
        in_order = self._fused is None  # kernels that go by addresses know KVCache's own order only
        self._reads_pages = in_order and reads_pages(model.device, self._cache, has_sinks=shape.has_sinks)
        self._graphs = self._record(shape, config)
        self.self_check()

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters, buffers, packed weights and KV cache."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        own = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if not tensor.is_meta}
        scales = 0 if self._switch is None else self._switch.num_bytes
        return sum(own.values()) + packed_bytes(self._model) + scales + self._cache.num_bytes

    @property
    def backend(self) -> str:
        """Who computes the packed layers, and on what."""
        fused = ", fused blocks" if self._fused is not None else ""
        graphs = ", decode graphs" if self._graphs is not None else ""
        return model_backend(self._model) + fused + graphs

    @property
    def vocab_size(self) -> int:
        """Token ids are below it: the rows of the embedding."""
        return int(self._model.config.get_text_config().vocab_size)

    @property
    def embedding_size(self) -> int:
        """Numbers that the head reads for each row."""
        assert self._head_input is not None, "the self check has run the head"
        return self._head_input.shape[-1]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion, by the model's generation_config."""
        eos = self._model.generation_config.eos_token_id if self._model.generation_config else None
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    def prepare(self, chunks: list[Chunk]) -> Batch:
        """Build the tensors of one step."""
        return self._build(chunks, self._windows)

    def _build(self, chunks: list[Chunk], windows: tuple[int, ...]) -> Batch:
        batch = build_batch(
            chunks,
            page_size=self._page_size,
            dtype=self.dtype,
            device=self.device,
            windows=windows,
            fused=self._fused is not None and not adapted(chunks),
            reads_pages=self._reads_pages,
        )
        return with_adapters(batch, chunks, self._adapters) if adapted(chunks) else batch

    def _fuse(self, config: EngineConfig) -> FusedBlocks | None:
        """Return the model's blocks as one function, where there is one for them."""
        if not config.fuse:
            return None
        if not isinstance(self._cache, KVCache):
            log.info("%s keeps transformers' own blocks: a cache in 8 bit is not fused", type(self._model).__name__)
            return None
        try:
            fused = FusedBlocks(self._model, config.page_size)
        except NotFusable as reason:
            log.info("%s keeps transformers' own blocks: %s", type(self._model).__name__, reason)
            return None
        self._cache = FusedKVCache(self._cache)
        return fused

    @torch.inference_mode()
    def _record(self, shape: ModelShape, config: EngineConfig) -> DecodeGraphs | None:
        """Return the steps that are recorded, where steps can be; a model that cannot be recorded is served without."""
        if not (config.decode_graphs and self._reads_pages) or self._fused is not None:
            return None
        from onebit_core.kernels.triton.paged_attention import KEYS_OF_SPLIT, part_bytes  # not where there is no Triton

        limits = Limits(
            rows=config.max_num_sequences,
            keys=self.capacity.max_model_len,
            page_size=self._page_size,
            spare_page=self.capacity.num_pages + self._check_pages + 1,
            split_keys=KEYS_OF_SPLIT,
            split_bytes=part_bytes(shape.num_heads, shape.num_kv_heads, shape.head_dim),
            windows=self._windows,
        )
        try:
            return DecodeGraphs(self._whole_step, limits, self.device)
        except Exception:  # it may wait for the device, or run out of its memory
            log.warning("%s is served without decode graphs", type(self._model).__name__, exc_info=True)
            return None

    def _whole_step(self, batch: Batch) -> Outputs:
        """Compute a step, all rows' logits included: what is recorded."""
        logits_TV = self._model_logits(batch)
        assert self._head_input is not None
        return logits_TV, self._head_input.flatten(0, -2)

    def _model_logits(self, batch: Batch, **rows: Tensor) -> Tensor:
        """Call the model over the paged cache; logits of all tokens, or of the rows to keep."""
        logits_1TV: Tensor = self._model(
            input_ids=batch.input_ids_1T,
            position_ids=batch.position_ids_1T,
            use_cache=False,
            paged=PagedStep(cache=self._cache, batch=batch),
            **rows,
        ).logits
        return logits_1TV[0]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Compute the batch: write its keys and values, and return the logits [R, V] of batch.logits_rows_R.

        Where a row takes an adapter, all rows are computed module by module: neither fused blocks nor recorded steps
        know of adapters.
        """
        if batch.adapters_T is None:
            return self._forward(batch, self._fused, self._graphs)
        assert self._switch is not None, "a row asks for an adapter, and there are none"
        self._switch.rows = batch.adapters_T
        try:
            return self._forward(batch, None)
        finally:
            self._switch.rows = None

    def _forward(self, batch: Batch, fused: FusedBlocks | None, graphs: DecodeGraphs | None = None) -> Tensor:
        if batch.fresh_pages_P is not None:
            self._cache.clear(batch.fresh_pages_P)
        replayed = None if graphs is None else graphs.replay(batch)
        if replayed is not None:
            logits_TV, self._head_input = replayed
            return logits_TV[batch.logits_rows_R]
        if fused is not None:
            assert isinstance(self._cache, FusedKVCache), "fused blocks have a cache in their order"
            hidden_RD = fused.hidden(batch, self._cache, batch.logits_rows_R)
            fused_RV: Tensor = self._model.get_output_embeddings()(hidden_RD)
            return fused_RV
        if self._takes_rows:
            return self._model_logits(batch, logits_to_keep=batch.logits_rows_R)
        return self._model_logits(batch)[batch.logits_rows_R]

    def head_input(self, batch: Batch) -> Tensor:
        """Return what the head read for the latest batch, the final norm's output: [R, D] for batch.logits_rows_R."""
        assert self._head_input is not None
        hidden_RD = self._head_input.flatten(0, -2)
        return hidden_RD if len(hidden_RD) == len(batch.logits_rows_R) else hidden_RD[batch.logits_rows_R]

    def _see_head_input(self, _head: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._head_input = arguments[0]

    @torch.inference_mode()
    def self_check(self) -> None:
        """Compute a few tokens through the paged path and compare with the untouched model.

        Raises:
            EngineStartFailed: the logits differ.
        """
        first_page = self.capacity.num_pages + 1
        request = GenerationRequest(
            request_id="self-check", prompt_token_ids=PROBE_TOKENS, sampling=SamplingParams(max_tokens=1)
        )
        sequence = Sequence(request=request, seed=0, tokens=list(PROBE_TOKENS))
        start = 0
        with exposed(self._model):
            # Fused blocks take the windows when they are made.
            fused = None if self._fused is None else FusedBlocks(self._model, self._page_size)
            for length, expected_V in zip(CHECK_CHUNKS, self._expected_CV, strict=True):
                pages = -(-(start + length) // self._page_size)
                sequence.page_table = array("q", range(first_page, first_page + pages))
                chunk = Chunk(sequence=sequence, start=start, length=length, draws=True)
                actual_V = self._forward(self._build([chunk], self._exposed_windows), fused)[0].float()
                self._compare(actual_V, expected_V)
                start += length
        if self._graphs is not None:
            self._check_graphs(sequence)

    def _check_graphs(self, sequence: Sequence) -> None:
        """Compute the last token again, recorded and not, with the model's own windows and soft caps."""
        chunk = Chunk(sequence=sequence, start=len(sequence.tokens) - 1, length=1, draws=True)
        plain_V, recorded_V = (
            self._forward(self._build([chunk], self._windows), None, graphs)[0].float()
            for graphs in (None, self._graphs)
        )
        self._compare(recorded_V, plain_V)

    def _compare(self, actual_V: Tensor, expected_V: Tensor) -> None:
        error = ((actual_V - expected_V).norm() / expected_V.norm()).item()
        if not error < CHECK_TOLERANCE:  # a NaN must not pass
            raise EngineStartFailed(
                f"{type(self._model).__name__} fails the engine's self check: logits over paged attention differ from "
                f"the model's own by {error:.1%}; this architecture cannot be served"
            )

    @torch.inference_mode()
    def _plain_logits(self) -> Tensor:
        """Return the untouched model's logits [C, V] at the end of every chunk of the self check."""
        ids_1T = torch.tensor([PROBE_TOKENS], device=self.device)
        logits_TV: Tensor = self._model(input_ids=ids_1T, use_cache=False).logits[0].float()
        ends = torch.tensor(CHECK_CHUNKS, device=self.device).cumsum(0) - 1
        return logits_TV[ends]

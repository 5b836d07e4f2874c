"""A model being served: its artifact, its tokenizer, its engine.

`generate` is the one door to the engine. It measures every sequence on the way, and turns an event that says a sequence
failed into an exception, so that whoever reads the stream sees tokens, an end, or a ServiceError.
"""

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from onebit_core.artifact.manifest import ORIGINAL, Manifest, Report
from service.accuracy.scorer import LiveScorer
from service.engine.client import EngineClient
from service.engine.types import FinishReason, GenerationRequest, TokenEvent
from service.errors import EngineBusy, EngineDead, GenerationFailed, ShuttingDown, UnknownModel
from service.metrics import EngineMetrics
from service.registry.golden import GoldenResult
from service.registry.vocabulary import Vocabulary
from service.registry.watch import GroupCounter, SequenceWatch

T = TypeVar("T")


@dataclass(kw_only=True)
class ServedModel:
    """One loaded artifact.

    Attributes:
        name: what requests call it.
        path: the artifact's folder.
        created: when it was loaded, Unix seconds.
        adapters: names of the adapters that its engine has.
        adapter: the one that requests to this view of the model take; "" for none.
        golden: how its engine did on the golden prompts; None where they were not asked.
        scorer: scores a share of the sequences against the original; None where none is.
        tokenizer: transformers' tokenizer of the artifact; used only through `in_tokenizer_thread`.
    """

    name: str
    path: Path
    manifest: Manifest
    report: Report
    tokenizer: Any
    engine: EngineClient
    metrics: EngineMetrics
    adapters: tuple[str, ...] = ()
    adapter: str = ""
    golden: GoldenResult | None = None
    scorer: LiveScorer | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _groups: GroupCounter = field(init=False)
    _views: dict[str, "ServedModel"] = field(default_factory=dict)
    _base: "ServedModel | None" = None
    _executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    def __post_init__(self) -> None:
        self._groups = GroupCounter(self.metrics, self.name)

    @property
    def served_as(self) -> str:
        """The name that answers carry."""
        return f"{self.name}:{self.adapter}" if self.adapter else self.name

    def with_adapter(self, adapter: str) -> "ServedModel":
        """Return the same model, whose requests take an adapter.

        Its answers differ from the original's on purpose, so nothing of it is scored.

        Args:
            adapter: one of `adapters`; "" for none.

        Raises:
            UnknownModel: the model has no such adapter.
        """
        if not adapter:
            return self
        if adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UnknownModel(f"model {self.name!r} has no adapter {adapter[:64]!r}; known: {known}", param="model")
        if adapter not in self._views:
            view = self._views[adapter] = copy.copy(self)
            view.adapter, view.scorer, view._base = adapter, None, self
        return self._views[adapter]

    @property
    def is_original(self) -> bool:
        """Whether nothing was quantized."""
        return self.manifest.method == ORIGINAL

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What each token writes; made on first use, which must be in the tokenizer thread."""
        return Vocabulary(self.tokenizer) if self._base is None else self._base.vocabulary

    async def in_tokenizer_thread(self, work: Callable[[], T]) -> T:
        """Run tokenizer work off the event loop; one thread per model, because tokenizers are not all reentrant.

        Raises:
            GenerationFailed: the tokenizer gave up on the text, as a pattern does that tries too many ways to match.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(_without_panic, work))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Stream one sequence; leaving early aborts it.

        Raises:
            EngineBusy: the queue is full.
            EngineDead: the engine process died.
            GenerationFailed: this sequence failed.
            ShuttingDown: the engine ended it because it stops.
        """
        if self.adapter:
            request = replace(request, adapter=self.adapter)
        watch = SequenceWatch(self.metrics, self.name, request, self._groups)
        scorer = self.scorer if self.scorer is not None and self.scorer.wants(request.request_id) else None
        completion: list[int] = []
        try:
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    watch.see(event)
                    _raise_if_failed(event)
                    if scorer is not None:
                        completion.extend(event.token_ids)
                        if event.finish_reason is not None:
                            scorer.offer(request.prompt_token_ids, completion)
                    yield event
        except EngineBusy:
            watch.reject()
            raise
        except EngineDead:
            watch.fail()
            raise
        finally:
            watch.close()

    async def stop(self) -> None:
        """Stop scorer, engine and tokenizer thread."""
        if self.scorer is not None:
            await self.scorer.stop()
        await self.engine.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _without_panic(work: Callable[[], T]) -> T:
    """Do tokenizer work; a panic of its Rust part, which is no Exception, becomes one."""
    try:
        return work()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GenerationFailed(f"the model's tokenizer failed on this text: {error}") from None


def _raise_if_failed(event: TokenEvent) -> None:
    """Turn an end that is not the caller's doing into an exception."""
    if event.finish_reason is FinishReason.ERROR:
        raise GenerationFailed(event.error or "the engine could not finish this sequence")
    if event.finish_reason is FinishReason.ABORT:
        raise ShuttingDown("the sequence was ended by the server")

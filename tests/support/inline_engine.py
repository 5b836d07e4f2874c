"""The engine's loop in this process and without a pipe: the same code, driven by a list of requests.

For tests of what the engine computes; the process around it has its own tests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from service.engine.loop import EngineLoop
from service.engine.messages import Abort, StepReport, Stop, Submit, ToEngine
from service.engine.process import decoder, describe, grammar_compiler, load
from service.engine.types import (
    EngineConfig,
    EngineStats,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from tests.support.plain_loader import PLAIN_LOADER


@dataclass
class Result:
    """What one request got, all events together."""

    text: str = ""
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    embedding: bytes | None = None

    def add(self, event: TokenEvent) -> None:
        """Take the next event."""
        self.text += event.text
        self.pieces.append(event.text)
        self.token_ids.extend(event.token_ids)
        self.logprobs.extend(event.logprobs)
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs
        self.finish_reason, self.error = event.finish_reason, event.error
        self.embedding = event.embedding


class InlineEngine:
    """A loaded model and a loop that runs until every request has ended."""

    def __init__(self, folder: Path, *, loader: str = PLAIN_LOADER, device: str = "cpu", **config) -> None:
        self.config = EngineConfig(artifact=str(folder), device=device, loader=loader, **config)
        self.runner, self.tokenizer = load(self.config)
        self.info = describe(self.runner, self.tokenizer)
        self.inbox: SimpleQueue[ToEngine] = SimpleQueue()
        self.reports: list[StepReport] = []
        self.results: dict[str, Result] = {}
        self.stopping = False
        self.abort_after: dict[str, int] = {}
        self.loop = EngineLoop(
            runner=self.runner,
            decode=decoder(self.tokenizer),
            compile_grammar=grammar_compiler(self.tokenizer, self.info).compile,
            eos_token_ids=self.info.eos_token_ids,
            config=self.config,
            inbox=self.inbox,
            publish=self._publish,
        )

    @property
    def stats(self) -> EngineStats:
        """After the latest step."""
        return self.reports[-1].stats

    def run(self, requests: Iterable[GenerationRequest]) -> list[Result]:
        """Queue every request, run until all have ended, and return their results in order."""
        ordered = list(requests)
        self.results = {request.request_id: Result() for request in ordered}
        self.stopping = False
        for request in ordered:
            self.inbox.put(Submit(request=request))
        self.loop.run()
        return [self.results[request.request_id] for request in ordered]

    def leave(self, request_id: str) -> None:
        """Abort a request, from any thread."""
        self.inbox.put(Abort(request_id=request_id))

    def _publish(self, report: StepReport) -> None:
        self.reports.append(report)
        for event in report.events:
            result = self.results[event.request_id]
            result.add(event)
            if len(result.token_ids) == self.abort_after.get(event.request_id):
                self.inbox.put(Abort(request_id=event.request_id))
        ended = all(result.finish_reason is not None for result in self.results.values())
        if ended and not self.stopping:
            self.stopping = True
            self.inbox.put(Stop())


def greedy(index: int, prompt: Sequence[int], max_tokens: int, **sampling) -> GenerationRequest:
    """Return a greedy request that goes on through end-of-sequence tokens, unless `sampling` says otherwise."""
    options = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return GenerationRequest(
        request_id=f"request-{index}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **options),
    )

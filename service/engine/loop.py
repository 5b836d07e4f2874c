"""The engine, on one screen: take messages, schedule, run, publish.

    while not stopped:
        take      what the server sent: Submit -> a waiting sequence, Abort -> its pages freed
        schedule  chunks under the token budget                                        scheduler
        run       batch -> forward -> one token per row that draws                     batch, runner, sampling
        publish   text, finish reasons and figures                                     completion

One of the project's three catch-all edges is here: whatever a step raises fails the sequences of that step, frees
their pages, and the loop goes on, if the runner's self check finds the device still in order. If not, the process ends
and the server starts another. A row that is not finite, or a token without text, fails only its own sequence.
"""

import logging
import secrets
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic

from service.engine.completion import Completion
from service.engine.detokenizer import Decode
from service.engine.messages import Abort, StepReport, Stop, Submit, ToEngine
from service.engine.page_allocator import PageAllocator
from service.engine.runner import Runner
from service.engine.sampling import Draw, sample, uniform_number
from service.engine.scheduler import Chunk, Scheduler
from service.engine.sequence import Sequence
from service.engine.types import EngineConfig, EngineStats, FinishReason, GenerationRequest, TokenEvent

log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits for this sequence are not finite (NaN or infinity)"
NOT_DECODED = "the tokenizer cannot turn a token of this sequence into text"


class EngineLoop:
    """Everything the engine process does once the model is loaded.

    Args:
        runner: the loaded model.
        decode: token ids to text.
        eos_token_ids: tokens that end a completion.
        config: of the engine.
        inbox: filled by whoever reads the pipe.
        publish: called with what happened, after every step and every abort.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        decode: Decode,
        eos_token_ids: tuple[int, ...],
        config: EngineConfig,
        inbox: SimpleQueue[ToEngine],
        publish: Callable[[StepReport], None],
    ) -> None:
        self._runner = runner
        self._decode = decode
        self._eos = frozenset(eos_token_ids)
        self._inbox = inbox
        self._publish = publish
        self._allocator = PageAllocator(runner.capacity.num_pages)
        self._scheduler = Scheduler(
            allocator=self._allocator,
            page_size=config.page_size,
            max_num_sequences=config.max_num_sequences,
            max_batched_tokens=config.max_batched_tokens,
        )
        self._completions: dict[str, Completion] = {}
        self._events: list[TokenEvent] = []
        self._num_steps = 0
        self._num_failed_steps = 0

    def run(self) -> None:
        """Run until told to stop."""
        while self._take():
            if self._scheduler.has_work:
                self._step()

    def _take(self) -> bool:
        """Handle every message that is there, waiting for one when idle; False after Stop."""
        while not self._inbox.empty() or not self._scheduler.has_work:
            if not self._scheduler.has_work:
                self._allocator.check_integrity()
            match self._inbox.get():
                case Submit(request=request):
                    self._submit(request)
                case Abort(request_id=request_id):
                    self._abort([request_id])
                case Stop():
                    self._abort(list(self._completions))
                    return False
        return True

    def _submit(self, request: GenerationRequest) -> None:
        seed = request.sampling.seed
        sequence = Sequence(
            request=request,
            seed=secrets.randbits(63) if seed is None else seed,
            tokens=list(request.prompt_token_ids),
        )
        try:
            self._completions[request.request_id] = Completion(
                sequence,
                decode=self._decode,
                eos_token_ids=self._eos,
                max_model_len=self._runner.capacity.max_model_len,
            )
        except Exception:  # a tokenizer that cannot decode this prompt can decode the others
            log.exception("a prompt cannot be decoded")
            self._emit(sequence, text="", token_ids=(), finish_reason=FinishReason.ERROR, error=NOT_DECODED)
            self._report(iteration_tokens=0)
            return
        self._scheduler.add(sequence)

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if request_id in self._completions:
                self._end(self._completions[request_id].sequence, FinishReason.ABORT)
        self._report(iteration_tokens=0)

    def _step(self) -> None:
        """Compute one step and publish what it gave."""
        chunks = self._scheduler.schedule()
        self._num_steps += 1
        now = monotonic()
        for chunk in chunks:
            chunk.sequence.started = chunk.sequence.started or now
        try:
            self._advance(chunks)
        except Exception as error:  # noqa: BLE001  (the engine's edge: a step must not take its neighbours along)
            self._fail(chunks, error)
        self._report(iteration_tokens=sum(chunk.length for chunk in chunks))

    def _advance(self, chunks: list[Chunk]) -> None:
        """Run the chunks, and give every sequence that drew a token its event."""
        batch = self._runner.prepare(chunks)
        tokens = sample(self._runner.forward(batch), [_draw(chunk.sequence) for chunk in batch.drawing])
        for chunk in chunks:
            self._scheduler.computed(chunk)
        for chunk, token in zip(batch.drawing, tokens, strict=True):
            if token is None:
                self._end(chunk.sequence, FinishReason.ERROR, error=NOT_FINITE)
            else:
                self._deliver(chunk.sequence, token)

    def _deliver(self, sequence: Sequence, token: int) -> None:
        """Turn one drawn token into an event, and free the sequence if it was the last."""
        try:
            advance = self._completions[sequence.request_id].advance(token)
        except Exception:  # the neighbours of the step have their own text
            log.exception("a token cannot be decoded")
            self._end(sequence, FinishReason.ERROR, error=NOT_DECODED)
            return
        if advance.finish_reason is not None:
            self._forget(sequence)
        self._emit(sequence, text=advance.text, token_ids=(token,), finish_reason=advance.finish_reason)

    def _fail(self, chunks: list[Chunk], error: Exception) -> None:
        """End the sequences of a step that raised; raise on if the runner is no longer in order."""
        self._num_failed_steps += 1
        log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        for chunk in chunks:
            if chunk.sequence.request_id in self._completions:
                self._end(chunk.sequence, FinishReason.ERROR, error=f"the engine's step failed: {error}")
        self._report(iteration_tokens=0)
        self._runner.self_check()

    def _end(self, sequence: Sequence, reason: FinishReason, *, error: str | None = None) -> None:
        """End a sequence without a token."""
        self._forget(sequence)
        self._emit(sequence, text="", token_ids=(), finish_reason=reason, error=error)

    def _forget(self, sequence: Sequence) -> None:
        del self._completions[sequence.request_id]
        self._scheduler.finish(sequence)

    def _emit(
        self,
        sequence: Sequence,
        *,
        text: str,
        token_ids: tuple[int, ...],
        finish_reason: FinishReason | None,
        error: str | None = None,
    ) -> None:
        is_first = sequence.num_generated_tokens == len(token_ids)
        waited = sequence.started - sequence.arrived if is_first and sequence.started is not None else None
        self._events.append(
            TokenEvent(
                request_id=sequence.request_id,
                text=text,
                token_ids=token_ids,
                finish_reason=finish_reason,
                error=error,
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_generated_tokens=sequence.num_generated_tokens,
                queue_seconds=waited,
            )
        )

    def _report(self, *, iteration_tokens: int) -> None:
        """Publish the events gathered since the last report, with the figures of now."""
        stats = EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_cache_usage=self._allocator.usage,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            iteration_tokens=iteration_tokens,
        )
        events, self._events = tuple(self._events), []
        self._publish(StepReport(events=events, stats=stats))


def _draw(sequence: Sequence) -> Draw:
    """Return how the sequence's next token is drawn."""
    sampling = sequence.request.sampling
    return Draw(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        uniform=uniform_number(sequence.seed, sequence.num_generated_tokens),
    )

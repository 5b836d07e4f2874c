"""The engine, on one screen: take messages, schedule, run, publish.

    while not stopped:
        take      what the server sent: Submit -> a waiting sequence, Abort -> its pages freed
        schedule  chunks under the token budget                            scheduler
        run       batch -> forward -> one token per row that draws         batch, runner, draw_state, sampling
                  log probabilities of the tokens that asked for them      logprobs
        publish   text, finish reasons and figures                         completion

One of the project's three catch-all edges is here: whatever a step raises fails the sequences of that step, frees
their pages, and the loop goes on, if the runner's self check finds the device still in order. If not, the process ends
and the server starts another. A row that is not finite, a token without text, or a grammar or a penalty that fails,
fails only its own sequence.

A request with a grammar waits beside the scheduler until a thread has compiled it, so that no step waits for it.
"""

import logging
import secrets
from collections.abc import Callable
from queue import SimpleQueue
from time import monotonic

from torch import Tensor
from torch.nn import functional as F

from service.engine.batch import Batch
from service.engine.completion import Completion
from service.engine.detokenizer import Decode
from service.engine.draw_state import DrawState
from service.engine.grammar import GrammarState
from service.engine.grammar_desk import Compiled, GrammarDesk
from service.engine.logprobs import token_logprobs
from service.engine.messages import Abort, StepReport, Stop, Submit, ToEngine
from service.engine.page_allocator import PageAllocator
from service.engine.runner import Runner
from service.engine.sampling import Draw, sample
from service.engine.scheduler import Chunk, Scheduler
from service.engine.sequence import Sequence
from service.engine.types import (
    NOT_FINITE,
    EngineConfig,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Grammar,
    TokenEvent,
    TokenLogprobs,
)

log = logging.getLogger(__name__)

NOT_DECODED = "the tokenizer cannot turn a token of this sequence into text"
NOT_COMPILED = "the grammar of this request cannot be compiled"
NOT_DRAWN = "the next token of this sequence cannot be drawn"
STAND_IN = Draw(temperature=0, top_p=1, uniform=0)  # for the draw of a sequence that has failed


class EngineLoop:
    """Everything the engine process does once the model is loaded.

    Args:
        runner: the loaded model.
        decode: token ids to text.
        compile_grammar: called in a thread of its own.
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
        compile_grammar: Callable[[Grammar], GrammarState],
        eos_token_ids: tuple[int, ...],
        config: EngineConfig,
        inbox: SimpleQueue[ToEngine | Compiled],
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
            prefix_caching=config.prefix_caching,
        )
        self._desk = GrammarDesk(compile_grammar, deliver=inbox.put)
        self._completions: dict[str, Completion] = {}
        self._draw_states: dict[str, DrawState] = {}
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
                self._scheduler.check_integrity()
            match self._inbox.get():
                case Submit(request=request):
                    self._submit(request)
                case Abort(request_id=request_id):
                    self._abort([request_id])
                case Compiled() as compiled:
                    self._compiled(compiled)
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
        if request.sampling.grammar is None:
            self._start(sequence, grammar=None)
        else:
            self._desk.submit(sequence, request.sampling.grammar)

    def _compiled(self, compiled: Compiled) -> None:
        """Go on with a sequence whose grammar is ready, unless it has left."""
        if compiled.error is not None and self._desk.waits(compiled.sequence):
            self._end(compiled.sequence, FinishReason.ERROR, error=f"{NOT_COMPILED}: {compiled.error}")
            self._report(iteration_tokens=0)
        elif self._desk.leave(compiled.sequence):
            self._start(compiled.sequence, grammar=compiled.state)

    def _start(self, sequence: Sequence, *, grammar: GrammarState | None) -> None:
        self._draw_states[sequence.request_id] = DrawState(sequence, end_token_ids=self._eos, grammar=grammar)
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
        logits_RV = self._runner.forward(batch)
        sequences = [chunk.sequence for chunk in batch.drawing]
        draws = [self._next_draw(sequence) for sequence in sequences]
        tokens = sample(logits_RV[: len(draws)], [STAND_IN if isinstance(draw, str) else draw for draw in draws])
        logprobs = _logprobs(logits_RV, sequences, tokens)
        _score_prompts(logits_RV[len(draws) :], batch)
        self._note_embeddings(batch)
        for chunk in chunks:
            self._scheduler.computed(chunk)
        for sequence, draw, token, logprob in zip(sequences, draws, tokens, logprobs, strict=True):
            if token is None:
                self._scheduler.distrust(sequence)
                self._end(sequence, FinishReason.ERROR, error=NOT_FINITE)
            elif isinstance(draw, str):
                self._end(sequence, FinishReason.ERROR, error=draw)
            elif sequence.request.sampling.max_tokens == 0:
                self._end(sequence, FinishReason.STOP if sequence.request.embed else FinishReason.LENGTH)
            else:
                self._deliver(sequence, token, logprob)

    def _note_embeddings(self, batch: Batch) -> None:
        """Keep what the head read at the last tokens of the prompts to embed; length 1, in float32."""
        rows = [row for row, chunk in enumerate(batch.drawing) if chunk.sequence.request.embed]
        if not rows:
            return
        embeddings_RD = F.normalize(self._runner.head_input(batch)[rows].float(), dim=-1).cpu()
        for row, embedding_D in zip(rows, embeddings_RD, strict=True):
            batch.drawing[row].sequence.embedding = embedding_D.numpy().astype("<f4").tobytes()

    def _next_draw(self, sequence: Sequence) -> Draw | str:
        """Return how the sequence's next token is drawn, or the sentence it fails with."""
        try:
            return self._draw_states[sequence.request_id].next_draw()
        except Exception as error:  # the neighbours of the step have their own grammars
            log.exception("a token cannot be drawn")
            return f"{NOT_DRAWN}: {error}"

    def _deliver(self, sequence: Sequence, token: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Turn one drawn token into an event, and free the sequence if it was the last."""
        failure = NOT_DRAWN
        try:
            self._draw_states[sequence.request_id].take(token)
            failure = NOT_DECODED
            advance = self._completions[sequence.request_id].advance(token)
        except Exception as error:  # the neighbours of the step have their own text
            log.exception(failure)
            self._end(sequence, FinishReason.ERROR, error=f"{failure}: {error}")
            return
        if advance.finish_reason is not None:
            self._forget(sequence)
        self._emit(
            sequence, text=advance.text, token_ids=(token,), finish_reason=advance.finish_reason, logprobs=logprobs
        )

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
        if not self._desk.leave(sequence):
            del self._draw_states[sequence.request_id]
            self._scheduler.finish(sequence)

    def _emit(
        self,
        sequence: Sequence,
        *,
        text: str,
        token_ids: tuple[int, ...],
        finish_reason: FinishReason | None,
        error: str | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
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
                logprobs=logprobs,
                prompt_logprobs=_prompt_logprobs(sequence) if is_first else None,
                num_cached_tokens=sequence.num_cached_tokens if is_first else 0,
                embedding=sequence.embedding,
            )
        )

    def _report(self, *, iteration_tokens: int) -> None:
        """Publish the events gathered since the last report, with the figures of now."""
        stats = EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting + self._desk.num_waiting,
            kv_cache_usage=self._allocator.usage,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            prefix_cache_queries=self._scheduler.prefix_cache_queries,
            prefix_cache_hits=self._scheduler.prefix_cache_hits,
            iteration_tokens=iteration_tokens,
        )
        events, self._events = tuple(self._events), []
        self._publish(StepReport(events=events, stats=stats))


def _logprobs(
    logits_RV: Tensor, sequences: list[Sequence], tokens: list[int | None]
) -> list[tuple[TokenLogprobs, ...]]:
    """Return what each drawn token's event says of log probabilities; the first rows are the sequences'."""
    asked = [
        (row, token, number)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        if (number := sequence.request.sampling.logprobs) is not None and token is not None
    ]
    reports: list[tuple[TokenLogprobs, ...]] = [()] * len(sequences)
    if asked:
        rows, drawn, numbers = (list(column) for column in zip(*asked, strict=True))
        for row, report in zip(rows, token_logprobs(logits_RV[rows], drawn, numbers), strict=True):
            reports[row] = (report,)
    return reports


def _score_prompts(logits_RV: Tensor, batch: Batch) -> None:
    """Note how probable the tokens of the prompts were that this step has scored."""
    first = 0
    for sequence, positions in batch.scored:
        targets = sequence.tokens[positions.start + 1 : positions.stop + 1]
        number = sequence.request.sampling.prompt_logprobs or 0
        part_RV = logits_RV[first : first + len(positions)]
        sequence.prompt_scores.extend(token_logprobs(part_RV, targets, [number] * len(positions)))
        first += len(positions)


def _prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs | None, ...] | None:
    """Return what the first event says of the prompt; None if it was not asked for, or the prompt was not computed."""
    if sequence.request.sampling.prompt_logprobs is None:
        return None
    is_scored = len(sequence.prompt_scores) == sequence.num_prompt_tokens - 1
    return (None, *sequence.prompt_scores) if is_scored else None

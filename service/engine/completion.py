"""One sequence's way out of the engine: from drawn tokens to text and a finish reason.

token --end?--> STOP, its text not shown              end: end-of-sequence unless ignore_eos, or a stop_token_id
  '--> Detokenizer --> StopStrings --complete?--> STOP    (not before min_tokens)
                          '--> text;  max_tokens or the context reached --> LENGTH
"""

from dataclasses import dataclass

from service.engine.detokenizer import Decode, Detokenizer
from service.engine.sequence import Sequence
from service.engine.stopping import Piece, StopStrings
from service.engine.types import FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Advance:
    """What one token added: text that may be shown, and the reason if it was the last."""

    text: str
    finish_reason: FinishReason | None


class Completion:
    """Text and end of one sequence."""

    def __init__(
        self, sequence: Sequence, *, decode: Decode, eos_token_ids: frozenset[int], max_model_len: int
    ) -> None:
        sampling = sequence.request.sampling
        self.sequence = sequence
        self._ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_token_ids)
        self._min_length = sequence.num_prompt_tokens + sampling.min_tokens
        self._max_length = min(sequence.num_prompt_tokens + sampling.max_tokens, max_model_len)
        self._detokenizer = Detokenizer(decode, sequence.request.prompt_token_ids)
        self._stop = StopStrings(sampling.stop, included=sampling.include_stop)

    def advance(self, token_id: int) -> Advance:
        """Append a drawn token to the sequence and say what may be shown of it."""
        self.sequence.tokens.append(token_id)
        if token_id in self._ends:
            return self._end(FinishReason.STOP)
        piece = self._push(self._detokenizer.push(token_id))
        if piece.stopped:
            return Advance(text=piece.text, finish_reason=FinishReason.STOP)
        if len(self.sequence.tokens) >= self._max_length:
            last = self._end(FinishReason.LENGTH)
            return Advance(text=piece.text + last.text, finish_reason=last.finish_reason)
        return Advance(text=piece.text, finish_reason=None)

    def _end(self, reason: FinishReason) -> Advance:
        """Give out what is held; the held end of a character may still complete a stop string."""
        piece = self._push(self._detokenizer.flush())
        if piece.stopped:
            return Advance(text=piece.text, finish_reason=FinishReason.STOP)
        return Advance(text=piece.text + self._stop.flush(), finish_reason=reason)

    def _push(self, text: str) -> Piece:
        return self._stop.push(text, may_end=len(self.sequence.tokens) >= self._min_length)

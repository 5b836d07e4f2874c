"""How one sequence's next token is drawn, and what is remembered from one to the next.

    next_draw  --> Draw: temperature and cuts, u(seed, index), edits <-- counts of its tokens, state of its grammar
    take(token) -> both move on by one token

A preempted sequence keeps its state: it never draws a token twice.
"""

from collections.abc import Collection

from torch import Tensor

from service.engine.grammar import GrammarState
from service.engine.logit_edits import WORD_BITS, LogitEdits, TokenCounts
from service.engine.sampling import Draw, uniform_number
from service.engine.sequence import Sequence


class DrawState:
    """What one sequence keeps between its draws.

    Args:
        sequence: whose tokens are drawn.
        end_token_ids: end-of-sequence tokens of the model.
        grammar: what its text must be; None for anything.
    """

    def __init__(
        self, sequence: Sequence, *, end_token_ids: Collection[int], grammar: GrammarState | None = None
    ) -> None:
        sampling = sequence.request.sampling
        self._sequence = sequence
        self._sampling = sampling
        self._grammar = grammar
        self._ends = tuple(sorted({*end_token_ids, *sampling.stop_token_ids}))
        self._counts: TokenCounts | None = None
        if sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty:
            prompt = sequence.request.prompt_token_ids if sampling.repetition_penalty != 1 else ()
            self._counts = TokenCounts(prompt)
        self._has_edits = bool(self._counts is not None or sampling.logit_bias or grammar is not None)

    def next_draw(self) -> Draw:
        """Return how the next token is drawn."""
        sampling, index = self._sampling, self._sequence.num_generated_tokens
        return Draw(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            uniform=uniform_number(self._sequence.seed, index) if sampling.temperature > 0 else 0.0,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            edits=self._edits() if self._has_edits or index < sampling.min_tokens else None,
        )

    def take(self, token_id: int) -> None:
        """Move on by a drawn token."""
        if self._counts is not None:
            self._counts.add(token_id)
        if self._grammar is not None:
            self._grammar.take(token_id)

    def _edits(self) -> LogitEdits:
        sampling = self._sampling
        forbidden = self._ends if self._sequence.num_generated_tokens < sampling.min_tokens else ()
        allowed = None
        if self._grammar is not None:
            allowed = self._grammar.allowed_bits()
            if not allowed.any():
                raise RuntimeError("the vocabulary has no token that continues the grammar")
            if forbidden and not _allows_others(allowed, forbidden):
                forbidden = ()  # the text is complete before min_tokens, and the grammar has only ends to offer
        return LogitEdits(
            allowed_bits=allowed,
            forbidden=forbidden,
            counts=self._counts,
            repetition=sampling.repetition_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
            bias=sampling.logit_bias,
        )


def _allows_others(bits_W: Tensor, token_ids: Collection[int]) -> bool:
    """Whether the words of bits allow a token besides these."""
    rest_W = bits_W.numpy().view("uint32").copy()
    for token_id in token_ids:
        rest_W[token_id // WORD_BITS] &= ~(1 << token_id % WORD_BITS) & 0xFFFFFFFF
    return bool(rest_W.any())

"""One growing list of tokens, and how far it has been computed. Data only; `scheduler` changes it."""

from array import array
from dataclasses import dataclass, field
from time import monotonic

from service.engine.prefix_cache import PageKey
from service.engine.types import GenerationRequest, TokenLogprobs


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """A request inside the engine.

        tokens     | prompt ............ | generated ....... |
        computed   |<- num_computed -------------->|           (its keys and values lie in the pages)

    The computed tokens chase the tokens. When they have caught up, the last one's logits give the next token, which
    puts the tokens one ahead again. A preempted sequence falls back to num_computed = 0 and chases anew, starting after
    what the prefix cache still holds of it; it never draws a token twice.

    Attributes:
        request: what was asked for.
        seed: of its draws: the request's own, or one from the system.
        tokens: prompt and generated tokens.
        num_computed: how many of them have keys and values in the cache.
        page_table: pages in order of position, as int64 so that a tensor can be made of it in one copy.
        page_keys: what its full pages are known by in the prefix cache, as far as that was asked for yet.
        num_cached_tokens: prompt tokens that the prefix cache held when the sequence was first admitted.
        num_preemptions: how often it gave its pages back.
        rank: priority, start in the fair queue, and number of arrival; the scheduler serves the lowest first.
        prompt_scores: log probabilities of the prompt's tokens from the second on, as far as they are computed; only if
            they were asked for.
        embedding: of the prompt, once it is computed and if it was asked for; see TokenEvent.
        arrived: clock at arrival, in seconds.
        started: clock at the first step; None while waiting for it.
    """

    request: GenerationRequest
    seed: int
    tokens: list[int]
    num_computed: int = 0
    page_table: "array[int]" = field(default_factory=lambda: array("q"))
    page_keys: list[PageKey] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    rank: tuple[int, int, int] = (0, 0, 0)
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    embedding: bytes | None = None
    arrived: float = field(default_factory=monotonic)
    started: float | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that were given."""
        return len(self.request.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that were drawn."""
        return len(self.tokens) - self.num_prompt_tokens

"""A working double of the live scorer: it chooses as the real one does, and keeps what it is offered."""

from collections.abc import Sequence

from service.accuracy.scorer import is_chosen


class KeepingScorer:
    """Stands where `service.accuracy.scorer.LiveScorer` stands."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share
        self.sequences: list[tuple[tuple[int, ...], list[int]]] = []

    def wants(self, request_id: str) -> bool:
        return is_chosen(request_id, self.share)

    def offer(self, prompt: Sequence[int], completion: Sequence[int]) -> None:
        self.sequences.append((tuple(prompt), list(completion)))

    async def stop(self) -> None:
        pass

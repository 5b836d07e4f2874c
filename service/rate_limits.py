"""How much a key may ask for in a minute: token buckets, one for requests and one for tokens.

    level(t) = min(limit, level(t0) + (t - t0) * limit / 60)      a request takes 1; refused while level < 1

A bucket allows a burst of a minute's worth and the limit on average; it needs two numbers and no timers. How many
tokens a request will use is known only at its end, so it is charged at once for all it may use, the prompt and
max_tokens, and given back what it did not use. A request for more than a minute's worth is charged a full bucket, and
the rest at its end: the level then is below zero, and the next request waits for it. The clock is monotonic, so setting
the machine's time changes nothing.

The figures are told as OpenAI tells them, in x-ratelimit-* headers of every answer to a key that has a limit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from service.errors import RateLimited

SECONDS = 60.0
MAX_IDLE_KEYS = 10_000


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a key may use in a minute; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def or_else(self, default: "Rates") -> "Rates":
        """Fill what is not set."""
        return Rates(
            requests_per_minute=self.requests_per_minute or default.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute or default.tokens_per_minute,
        )


@dataclass(kw_only=True)
class Bucket:
    """One limit of one key.

    Attributes:
        limit: per minute, and most that can be saved up.
        level: what was there at `since`.
        since: clock, in seconds.
    """

    limit: int
    level: float
    since: float

    def refill(self, now: float) -> None:
        """Add what has come back."""
        self.level = min(self.limit, self.level + (now - self.since) * self.limit / SECONDS)
        self.since = now

    def seconds_until(self, level: float) -> float:
        """How long it takes until so much is there; 0 if it is."""
        return max(0.0, (level - self.level) * SECONDS / self.limit)


class Allowance:
    """What one key has left.

    Args:
        clock: in seconds; tests pass their own.
        on_refused: told which limit refused, "requests" or "tokens".
    """

    def __init__(self, clock: Callable[[], float], on_refused: Callable[[str], None]) -> None:
        self._clock = clock
        self._on_refused = on_refused
        self._buckets: dict[str, Bucket] = {}

    def follow(self, rates: Rates) -> None:
        """Take the limits in force, which may have changed since the last request."""
        for kind, limit in (("requests", rates.requests_per_minute), ("tokens", rates.tokens_per_minute)):
            if limit is None:
                self._buckets.pop(kind, None)
            elif kind not in self._buckets:
                self._buckets[kind] = Bucket(limit=limit, level=limit, since=self._clock())
            else:
                self._buckets[kind].limit = limit

    @property
    def is_full(self) -> bool:
        """Whether nothing would be lost by forgetting it."""
        return all(bucket.level >= bucket.limit for bucket in self._refilled().values())

    def take_request(self) -> None:
        """Charge one request.

        Raises:
            RateLimited: the key has sent its requests of this minute.
        """
        bucket = self._refilled().get("requests")
        if bucket is not None:
            self._check(bucket, "requests", 1)
            bucket.level -= 1

    @contextmanager
    def spend_tokens(self, most: int, used: Callable[[], int]) -> Iterator[None]:
        """Charge tokens for the work in the block.

        Args:
            most: how many it may use, which is charged at its beginning.
            used: how many it has used, which is charged instead at its end.

        Raises:
            RateLimited: so many are not left.
        """
        bucket = self._refilled().get("tokens")
        if bucket is None:
            yield
            return
        charged = min(most, bucket.limit)
        self._check(bucket, "tokens", charged)
        bucket.level -= charged
        try:
            yield
        finally:
            bucket.refill(self._clock())
            bucket.level = min(bucket.limit, bucket.level + charged - used())

    def headers(self) -> dict[str, str]:
        """The x-ratelimit-* headers."""
        told: dict[str, str] = {}
        for kind, bucket in self._refilled().items():
            told[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
            told[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            told[f"x-ratelimit-reset-{kind}"] = in_words(bucket.seconds_until(bucket.limit))
        return told

    def _refilled(self) -> dict[str, Bucket]:
        now = self._clock()
        for bucket in self._buckets.values():
            bucket.refill(now)
        return self._buckets

    def _check(self, bucket: Bucket, kind: str, wanted: float) -> None:
        if bucket.level >= wanted:
            return
        seconds = bucket.seconds_until(wanted)
        self._on_refused(kind)
        raise RateLimited(
            f"this key may use {bucket.limit} {kind} a minute and has {max(0, math.floor(bucket.level))} left, of "
            f"{wanted:g} asked for; try again in {in_words(seconds)}",
            retry_after_seconds=seconds,
        )


@dataclass
class RateLimits:
    """The allowances of all keys.

    Attributes:
        default: for keys without limits of their own.
        on_refused: told which limit refused a request.
        clock: in seconds.
    """

    default: Rates
    on_refused: Callable[[str], None] = lambda _kind: None
    clock: Callable[[], float] = monotonic
    _allowances: dict[str, Allowance] = field(default_factory=dict)

    def of(self, key_id: str, rates: Rates) -> Allowance | None:
        """Return what a key has left; None if it has no limit."""
        rates = rates.or_else(self.default)
        if rates == Rates():
            self._allowances.pop(key_id, None)
            return None
        allowance = self._allowances.get(key_id)
        if allowance is None:
            self._forget_idle_keys()
            allowance = self._allowances[key_id] = Allowance(self.clock, self.on_refused)
        allowance.follow(rates)
        return allowance

    def _forget_idle_keys(self) -> None:
        """Drop keys that are gone or idle, when there are many."""
        if len(self._allowances) >= MAX_IDLE_KEYS:
            self._allowances = {key: kept for key, kept in self._allowances.items() if not kept.is_full}


def in_words(seconds: float) -> str:
    """Write a time as OpenAI's headers do: 120ms, 7.5s, 1m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < SECONDS:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"

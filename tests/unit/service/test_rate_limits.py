"""Token buckets: what may be used at once, what comes back, what is given back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import RateLimited
from service.rate_limits import RateLimits, Rates, in_words


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def limits(clock, requests=None, tokens=None, refused=None):
    default = Rates(requests_per_minute=requests, tokens_per_minute=tokens)
    return RateLimits(default, on_refused=(refused if refused is not None else []).append, clock=clock)


def allowed(allowance):
    """How many requests pass until one is refused."""
    for count in range(10_000):
        try:
            allowance.take_request()
        except RateLimited:
            return count
    raise AssertionError("nothing was refused")


def test_a_minutes_worth_at_once_then_the_rate(clock):
    """A burst of the limit passes, then one for each share of a minute."""
    refused = []
    allowance = limits(clock, requests=60, refused=refused).of("a", Rates())
    assert allowed(allowance) == 60
    clock.now += 10.5
    assert allowed(allowance) == 10
    clock.now += 3600
    assert allowed(allowance) == 60
    assert refused == ["requests"] * 3


def test_the_refusal_says_when_to_come_back(clock):
    """After exactly that time the request passes."""
    allowance = limits(clock, requests=6).of("a", Rates())
    allowed(allowance)
    with pytest.raises(RateLimited) as refused:
        allowance.take_request()
    assert refused.value.retry_after_seconds == pytest.approx(10)
    clock.now += refused.value.retry_after_seconds + 1e-6
    allowance.take_request()


def test_tokens_are_charged_for_all_that_may_be_used_and_given_back(clock):
    """While a request runs its max_tokens are spoken for; at its end only what it used is gone."""
    allowance = limits(clock, tokens=1000).of("a", Rates())
    with allowance.spend_tokens(700, lambda: 100):
        with pytest.raises(RateLimited, match="300 left"), allowance.spend_tokens(301, lambda: 0):
            pass
        assert allowance.headers()["x-ratelimit-remaining-tokens"] == "300"
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "900"


def test_more_than_a_minutes_worth_needs_a_full_bucket_and_leaves_a_debt(clock):
    """A request over the limit is not refused for ever, and not free."""
    allowance = limits(clock, tokens=1000).of("a", Rates())
    with allowance.spend_tokens(5000, lambda: 2000):
        pass
    with pytest.raises(RateLimited) as refused, allowance.spend_tokens(1, lambda: 1):
        pass
    assert refused.value.retry_after_seconds == pytest.approx(60.06)
    clock.now += 120
    with allowance.spend_tokens(5000, lambda: 1):
        pass


def test_what_fails_gives_back_what_it_was_charged(clock):
    """A request that the engine refused has used nothing."""
    allowance = limits(clock, tokens=100).of("a", Rates())
    with pytest.raises(ZeroDivisionError), allowance.spend_tokens(100, lambda: 0):
        raise ZeroDivisionError
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "100"


def test_keys_have_limits_of_their_own_which_may_change(clock):
    """A key's own limit counts before the server's, from the next request on; keys do not share."""
    rates = limits(clock, requests=2)
    assert allowed(rates.of("a", Rates())) == 2
    assert allowed(rates.of("b", Rates(requests_per_minute=5))) == 5
    assert rates.of("a", Rates(requests_per_minute=60)).headers()["x-ratelimit-limit-requests"] == "60"
    clock.now += 1
    assert allowed(rates.of("a", Rates(requests_per_minute=60))) == 1
    assert limits(clock).of("a", Rates()) is None


def test_the_headers_are_openais(clock):
    """Limit, what remains, and when it is full again."""
    allowance = limits(clock, requests=60, tokens=6000).of("a", Rates())
    for _ in range(3):
        allowance.take_request()
    assert allowance.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "57",
        "x-ratelimit-reset-requests": "3s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "6000",
        "x-ratelimit-reset-tokens": "0ms",
    }


def test_times_in_words():
    """As Go writes durations."""
    assert [in_words(seconds) for seconds in (0, 0.12, 7.5, 59.9, 60, 61, 3600)] == [
        "0ms", "120ms", "7.5s", "59.9s", "1m0s", "1m1s", "60m0s",
    ]  # fmt: skip


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60), st.integers(1, 100))
def test_no_sequence_of_requests_gets_more_than_the_rate(steps, limit):
    """In any time t at most limit * (1 + t / 60) requests pass."""
    clock = Clock()
    allowance = limits(clock, requests=limit).of("a", Rates())
    passed = 0
    for pause, wanted in steps:
        clock.now += pause
        for _ in range(wanted):
            try:
                allowance.take_request()
            except RateLimited:
                break
            passed += 1
    assert passed <= limit * (1 + (clock.now - 1000.0) / 60) + 1e-6

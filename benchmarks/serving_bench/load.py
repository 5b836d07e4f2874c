"""The client: so many at once, each asks again as soon as it has its answer, and notes when every piece arrived.

    sent          first text        text   text              text, end
     |-----------------|--------------|------|------------------|
       time to first          gaps between pieces: inter-token
           token                    latencies

All streams run in one thread of one process with one HTTP client, the same for every server. Tokens are counted by the
server (`usage` of the last event); a server that tells none is believed to send a token a piece. An answer shorter than
what was asked for is an error, so that no server wins by stopping early.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

REQUEST_SECONDS = 900.0
SHOWN_ERROR_LETTERS = 300


@dataclass(kw_only=True)
class Trace:
    """What one request met; times are those of time.perf_counter().

    Attributes:
        sent: when it left.
        arrivals: when each piece of text came.
        ended: when the answer ended.
        prompt_tokens: as the server counts them; 0 if it does not.
        output_tokens: the same of what it wrote.
        error: empty if all went well.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def first_token_seconds(self) -> float:
        """From sending to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between one piece of text and the next."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to ask, and how.

    Attributes:
        url: of the completions endpoint.
        model: name in requests.
        extra: fields this server wants besides the common ones.
    """

    url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, prompt: str, output_tokens: int) -> dict[str, Any]:
        """Return the request for a greedy completion of exactly so many tokens, streamed."""
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


async def run_load(target: Target, prompts: Sequence[str], *, output_tokens: int, concurrency: int) -> list[Trace]:
    """Ask every prompt once, so many at a time; returns what each met, in order."""
    waiting = iter(range(len(prompts)))
    traces: dict[int, Trace] = {}
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx2.AsyncClient(limits=limits, timeout=REQUEST_SECONDS, trust_env=False) as client:

        async def one_after_another() -> None:
            for index in waiting:
                traces[index] = await ask(client, target, prompts[index], output_tokens)

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return [traces[index] for index in range(len(prompts))]


async def ask(client: httpx2.AsyncClient, target: Target, prompt: str, output_tokens: int) -> Trace:
    """Send one request and note what comes."""
    trace = Trace(sent=time.perf_counter())
    try:
        async with client.stream("POST", target.url, json=target.body(prompt, output_tokens)) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                trace.error = f"status {answer.status_code}: {text[:SHOWN_ERROR_LETTERS]}"
            else:
                await _follow(answer.aiter_raw(), trace)
    except httpx2.HTTPError as error:
        trace.error = f"{type(error).__name__}: {error}"
    trace.ended = time.perf_counter()
    trace.output_tokens = trace.output_tokens or len(trace.arrivals)
    if not trace.error and (trace.output_tokens != output_tokens or not trace.arrivals):
        trace.error = f"{trace.output_tokens} tokens in {len(trace.arrivals)} pieces instead of {output_tokens} tokens"
    return trace


async def _follow(pieces: AsyncIterator[bytes], trace: Trace) -> None:
    """Read an event stream to its end."""
    rest = b""
    async for piece in pieces:
        now = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                _note(json.loads(line[5:]), now, trace)


def _note(event: Mapping[str, Any], now: float, trace: Trace) -> None:
    """Add one event to what a request met."""
    if event.get("error"):
        trace.error = json.dumps(event["error"])[:SHOWN_ERROR_LETTERS]
    usage = event.get("usage")
    if usage:
        trace.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        trace.output_tokens = int(usage.get("completion_tokens") or 0)
    if any(choice.get("text") for choice in event.get("choices") or ()):
        trace.arrivals.append(now)

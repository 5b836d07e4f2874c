"""Users: they ask, and know what the answer must be."""

import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2
from openai import APIConnectionError, APIError, APIStatusError, OpenAI

PROMPTS = tuple(f"The {word} is" for word in ("house", "river", "library", "clerk", "ladder", "lamp", "shelf", "book"))
MAX_TOKENS = 24
SECONDS = 60.0


def connect(url: str) -> OpenAI:
    """Return a client that does not try again by itself."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS)


def ask(client: OpenAI, model: str, prompt: str, seed: int | None, *, stream: bool) -> str:
    """Return the completion of a prompt: greedy without a seed, drawn with one."""
    temperature = 0.0 if seed is None else 1.0
    if not stream:
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=temperature, seed=seed
        )
        return answer.choices[0].text
    pieces = client.completions.create(
        model=model, prompt=prompt, max_tokens=MAX_TOKENS, temperature=temperature, seed=seed, stream=True
    )
    text, is_whole = "", False
    for piece in pieces:
        for choice in piece.choices:
            text += choice.text
            is_whole = is_whole or choice.finish_reason is not None
    if not is_whole:
        raise httpx2.RemoteProtocolError("the stream ended before the answer did")
    return text


@dataclass
class Traffic:
    """Clients that ask until told to stop.

    Attributes:
        outcomes: right, wrong, refused (429, 502, 503, no connection), cut, or the status of another refusal.
        wrong: what was asked, expected and answered, of wrong answers.
        longest_gap: most seconds without a right answer, all clients together.
    """

    url: str
    model: str
    expected: dict[tuple[str, int | None], str]
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    longest_gap: float = 0.0
    _last_right: float = field(default_factory=time.monotonic)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, clients: int) -> None:
        """Start asking."""
        self._last_right = time.monotonic()
        for number in range(clients):
            thread = threading.Thread(target=self._run, args=(random.Random(number),))
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop asking, and wait for the last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, draw: random.Random) -> None:
        client = connect(self.url)
        while not self._stop.is_set():
            prompt, seed = draw.choice(list(self.expected))
            try:
                text = ask(client, self.model, prompt, seed, stream=draw.random() < 0.5)
                outcome = "right" if text == self.expected[prompt, seed] else "wrong"
                if outcome == "wrong":
                    self.wrong.append((prompt, self.expected[prompt, seed], text))
            except APIStatusError as error:
                outcome = "refused" if error.status_code in (429, 502, 503) else f"status {error.status_code}"
            except APIConnectionError:
                outcome = "refused"
            except (APIError, httpx2.HTTPError):
                outcome = "cut"
            self._note(outcome)
            if outcome != "right":
                time.sleep(0.2)

    def _note(self, outcome: str) -> None:
        with self._lock:
            self.outcomes[outcome] += 1
            now = time.monotonic()
            if outcome == "right":
                self.longest_gap = max(self.longest_gap, now - self._last_right)
                self._last_right = now

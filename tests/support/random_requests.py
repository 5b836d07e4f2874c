"""Random requests for completions, each with everything that decides its text: the same seed, the same requests."""

import random
from collections.abc import Sequence
from typing import Any

LONGEST_PROMPT = 40
LONGEST_COMPLETION = 40


def random_request(numbers: random.Random, model: str, words: Sequence[str]) -> dict[str, Any]:
    """Return one request: prompts that share beginnings, every way of drawing, ends of every kind.

    Args:
        numbers: where chance comes from.
        model: name of it.
        words: what prompts are made of; prompts that begin alike meet in the prefix cache.
    """
    length = numbers.choice((1, 2, 5, 9, 17, LONGEST_PROMPT))
    start = numbers.choice((0, 0, numbers.randrange(len(words))))
    prompt = " ".join(words[(start + place) % len(words)] for place in range(length))
    request: dict[str, Any] = {
        "model": model,
        "prompt": prompt[: 3 * LONGEST_PROMPT],
        "max_tokens": numbers.randint(1, LONGEST_COMPLETION),
        "temperature": numbers.choice((0, 0.7, 1.0, 1.5)),
        "seed": numbers.randrange(1 << 31),
        "ignore_eos": numbers.random() < 0.7,
    }
    options: dict[str, Any] = {
        "n": numbers.choice((1, 2, 3)),
        "top_p": numbers.choice((0.3, 0.9, 1.0)),
        "top_k": numbers.choice((1, 5, 50)),
        "min_p": numbers.choice((0.0, 0.05, 0.3)),
        "frequency_penalty": numbers.choice((-1.0, 0.5, 2.0)),
        "presence_penalty": numbers.choice((-1.0, 0.5, 2.0)),
        "repetition_penalty": numbers.choice((0.8, 1.2, 1.5)),
        "logit_bias": {str(numbers.randrange(97, 123)): numbers.choice((-5, 3, 100))},
        "min_tokens": numbers.randint(0, request["max_tokens"]),
        "stop": [numbers.choice("aeiou "), "th"],
        "logprobs": numbers.randint(0, 5),
        "priority": numbers.randint(-2, 2),
    }
    for name in numbers.sample(sorted(options), k=numbers.randint(0, 4)):
        request[name] = options[name]
    return request

"""Prompts of an exact length, all different, cut from a text.

Repeated or made-up words would flatter whoever caches prefixes or guesses tokens ahead. So every prompt is a window of
real text at a random place; equal seeds give equal prompts, for every server the same. They are sent as text, for not
all servers take token ids, and a text does not always become the tokens it was cut from: windows that do not survive
the way back are passed over.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

TRIES_PER_PROMPT = 200


class PromptSource:
    """Cuts prompts out of one text.

    Args:
        tokenizer: of the model.
        text: long enough for what will be asked of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def prompts(self, count: int, num_tokens: int, seed: int) -> list[str]:
        """Return so many different prompts of so many tokens.

        Raises:
            ValueError: the text is too short for them.
        """
        numbers = random.Random(seed)
        found: dict[str, None] = {}
        for start in self._starts(numbers, count * TRIES_PER_PROMPT, num_tokens):
            text = str(self._tokenizer.decode(self._ids[start : start + num_tokens]))
            again = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(again) == num_tokens:
                found[text] = None
            if len(found) == count:
                return list(found)
        raise ValueError(
            f"the text of {len(self._ids)} tokens has no {count} different prompts of {num_tokens} tokens; "
            "give a longer one with --text"
        )

    def _starts(self, numbers: random.Random, tries: int, num_tokens: int) -> Iterator[int]:
        last = len(self._ids) - num_tokens
        for _ in range(tries if last >= 0 else 0):
            yield numbers.randint(0, last)

"""Text that the model writes itself, for calibration and distillation without any data.

    document = begin token (where the tokenizer puts one), then
               one token drawn evenly from the vocabulary,
               the next 3 to 5 tokens greedily: argmax p(x_t | x_<t),
               all others drawn from p(x_t | x_<t) = softmax(logits), at temperature 1,
               until the model ends it

Source: LLM-QAT, arXiv:2305.17888, section 3.1: the first tokens greedily, since a sampled start soon leaves what the
model has learned; the rest sampled, since text that is greedy throughout repeats itself. OneBit (arXiv:2402.11295,
section 4.1) trains on such text. We differ: a special or added token is never a document's first, ids that the
tokenizer does not know (rows that only pad the embedding) are never drawn, and a window goes on with a new document
where one ends, so that it is always full.

Many windows are written at once with a KV cache. A new document must not see the one before it in its window, so its
row of the attention mask begins at its own first token, and so do its positions: every token is distributed as if its
document were alone. All choices at place t of window s come from one number u_st in [0, 1), drawn beforehand on the
CPU: the same seed gives the same text there, whatever the number of windows written at once, up to rounding of the
logits, which now and then turns a choice.

Shape suffixes: S = samples, T = tokens of a sample, B = samples at once, V = vocabulary, F = possible first tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from onebit_core.progress import Watch

STAGE = "write text"
WINDOWS_AT_ONCE = 32
FEWEST_GREEDY, MOST_GREEDY = 3, 5


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Which tokens may stand where.

    Attributes:
        begin: the token that the tokenizer puts before every text; None if it puts none.
        first_F: ids that may begin a document.
        ends: ids that end one.
        unknown_V: bool, ids that the tokenizer does not know.
    """

    begin: int | None
    first_F: Tensor
    ends: Tensor
    unknown_V: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any) -> "Vocabulary":
        """Read the vocabulary of a model and its tokenizer."""
        rows: int = model.config.get_text_config().vocab_size
        known = {index for index in tokenizer.get_vocab().values() if index < rows}
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        ends = {tokenizer.eos_token_id, *_listed(model.config), *_listed(model.generation_config)} - {None}
        unknown_V = torch.ones(rows, dtype=torch.bool)
        unknown_V[sorted(known)] = False
        begin = tokenizer("")["input_ids"]
        return cls(
            begin=begin[0] if begin else None,
            first_F=torch.tensor(sorted(known - special - ends)),
            ends=torch.tensor(sorted(ends), dtype=torch.int64),
            unknown_V=unknown_V.to(model.device),
        )


def _listed(config: Any) -> list[int | None]:
    """Return a configuration's end tokens, which may be none, one or several."""
    end = getattr(config, "eos_token_id", None)
    return list(end) if isinstance(end, list | tuple) else [end]


def write_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    samples: int,
    tokens: int,
    seed: int,
    at_once: int = WINDOWS_AT_ONCE,
    watch: Watch | None = None,
) -> Tensor:
    """Let a model write windows of text.

    Args:
        model: whole, in evaluation mode.
        tokenizer: its tokenizer.
        samples: S.
        tokens: T, at most the model's context.
        seed: of all choices.
        at_once: windows in one batch.
        watch: told after every token, in stage `write text`; a unit is one token of every window of a batch.

    Returns:
        ids_ST, int64, on the CPU.

    Raises:
        Cancelled: between two tokens.
    """
    watch = watch or Watch()
    vocabulary = Vocabulary.of(model, tokenizer)
    batches = draw_numbers(samples, tokens, torch.Generator().manual_seed(seed)).split(at_once)
    total, parts = len(batches) * tokens, []

    def tell(before: int, place: int) -> None:
        watch.report(STAGE, before + place, total)

    tell(0, 0)
    for index, draws_BT in enumerate(batches):
        ids_BT, _ = write_batch(model, vocabulary, draws_BT, partial(tell, index * tokens))
        parts.append(ids_BT)
    return torch.cat(parts)


def write_documents(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    documents: int,
    tokens: int,
    seed: int,
    at_once: int = WINDOWS_AT_ONCE,
    watch: Watch | None = None,
) -> Iterator[str]:
    """Let a model write documents of at most `tokens` tokens; one that the model has not ended by then is cut.

    Yields:
        The text of a document, without special tokens.

    Raises:
        Cancelled: between two tokens.
    """
    watch = watch or Watch()
    vocabulary = Vocabulary.of(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    done = 0

    def tell(place: int) -> None:
        watch.report(STAGE, done, documents, tokens=place)

    watch.report(STAGE, 0, documents)
    while done < documents:
        draws_BT = draw_numbers(min(at_once, documents - done), tokens, generator)
        ids_BT, begins_BT = write_batch(model, vocabulary, draws_BT, tell)
        for ids_T, begins_T in zip(ids_BT, begins_BT, strict=True):
            places = begins_T.nonzero().flatten()[1:].tolist()
            for part in ids_T.tensor_split(places)[: documents - done]:
                yield tokenizer.decode(part.tolist(), skip_special_tokens=True)
                done += 1
    watch.tell(STAGE, done, documents)


def draw_numbers(samples: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Draw what decides the text: float64 [S, T] in [0, 1)."""
    return torch.rand(samples, tokens, dtype=torch.float64, generator=generator)


@torch.inference_mode()
def write_batch(
    model: PreTrainedModel, vocabulary: Vocabulary, draws_BT: Tensor, told: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """Write one batch of windows.

    Args:
        model: whole, in evaluation mode.
        vocabulary: its tokens.
        draws_BT: float64 in [0, 1), one number a token.
        told: called with the number of tokens that every window has.

    Returns:
        ids_BT, int64, and begins_BT, bool: where a document begins; both on the CPU.
    """
    rows, tokens = draws_BT.shape
    ids_BT = torch.zeros(rows, tokens, dtype=torch.int64)
    begins_BT = torch.zeros(rows, tokens, dtype=torch.bool)
    begins_B = torch.ones(rows, dtype=torch.bool)
    start_B, greedy_B = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    lead = 0 if vocabulary.begin is None else 1
    cache = DynamicCache(config=model.config)
    logits_BV: Tensor | None = None
    for place in range(tokens):
        start_B = torch.where(begins_B, place, start_B)
        age_B = place - start_B
        first_B, count_B = _choose_first(vocabulary, draws_BT[:, place])
        greedy_B = torch.where(age_B == lead, count_B, greedy_B)
        ids_B = first_B
        if logits_BV is not None:
            best_B, drawn_B = _choose_next(logits_BV, draws_BT[:, place])
            following_B = torch.where(age_B <= lead + greedy_B, best_B, drawn_B)
            ids_B = torch.where(age_B == lead, first_B, following_B)
        if vocabulary.begin is not None:
            ids_B = torch.where(age_B == 0, vocabulary.begin, ids_B)
        ids_BT[:, place], begins_BT[:, place] = ids_B, begins_B
        begins_B = torch.isin(ids_B, vocabulary.ends) & (age_B >= lead)  # a begin token may be an end token, too
        if place + 1 < tokens:
            seen_BT = torch.arange(place + 1) >= start_B[:, None]
            logits_BV = _advance(model, cache, ids_B, age_B, seen_BT).masked_fill(vocabulary.unknown_V, -torch.inf)
        told(place + 1)
    return ids_BT, begins_BT


def _advance(model: PreTrainedModel, cache: DynamicCache, ids_B: Tensor, age_B: Tensor, seen_BT: Tensor) -> Tensor:
    """Give every row its next token at its place in the document; return the logits of the one after, float64."""
    output: Any = model(
        input_ids=ids_B[:, None].to(model.device),
        attention_mask=seen_BT.long().to(model.device),
        position_ids=age_B[:, None].to(model.device),
        past_key_values=cache,
        use_cache=True,
    )
    logits_BV: Tensor = output.logits[:, -1].double()
    return logits_BV


def _choose_first(vocabulary: Vocabulary, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return a document's first token, and how many greedy ones follow: the number's fraction decides that."""
    scaled_B = draws_B * len(vocabulary.first_F)
    kinds = MOST_GREEDY - FEWEST_GREEDY + 1
    count_B = FEWEST_GREEDY + (scaled_B.frac() * kinds).long()
    return vocabulary.first_F[scaled_B.long()], count_B


def _choose_next(logits_BV: Tensor, draws_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token, and the one where the distribution function passes the number drawn."""
    passed_BV = torch.softmax(logits_BV, dim=-1).cumsum(dim=-1)
    wanted_B1 = draws_B[:, None].to(logits_BV.device) * passed_BV[:, -1:]
    drawn_B = torch.searchsorted(passed_BV, wanted_B1, right=True)[:, 0]
    return logits_BV.argmax(dim=-1).cpu(), drawn_B.cpu()

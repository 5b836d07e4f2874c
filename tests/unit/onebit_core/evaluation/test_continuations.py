"""Log-likelihoods of continuations: those of the plain computation, however sequences are put together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from onebit_core.errors import EvaluationError
from onebit_core.evaluation.continuations import ContinuationScorer
from tests.support.tiny_model import ARCHITECTURES, MAX_POSITIONS, save_tiny_model

Pairs = list[tuple[list[int], list[int]]]


@pytest.fixture
def pairs() -> Pairs:
    """Seven pairs of different lengths, the last ones with one token of context and of continuation."""
    random = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=random).tolist()

    return [(ids(3 + 5 * index), ids(1 + index % 3)) for index in range(5)] + [(ids(1), ids(90)), (ids(1), ids(1))]


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, **options)).eval()


@torch.inference_mode()
def plain(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One sequence alone, complete logits."""
    log_p_TV = F.log_softmax(model(torch.tensor([[*context, *continuation]])).logits[0, :-1].double(), dim=-1)
    of_continuation_NV = log_p_TV[len(context) - 1 :]
    wanted_N = torch.tensor(continuation)
    total = of_continuation_NV[torch.arange(len(wanted_N)), wanted_N].sum().item()
    return total, bool((of_continuation_NV.argmax(-1) == wanted_N).all())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("positions", [1, 60, 4096])
def test_scores_are_those_of_each_sequence_alone(
    tmp_path: Path, pairs: Pairs, architecture: str, positions: int
) -> None:
    """In the order given: one sequence a batch, a few, or all side by side."""
    model = load(tmp_path, architecture=architecture)

    scores = ContinuationScorer(model, positions).score(pairs)

    for (total, _), pair in zip(scores, pairs, strict=True):
        assert total == pytest.approx(plain(model, *pair)[0], rel=1e-4)


def test_greedy_is_what_greedy_decoding_writes(tmp_path: Path) -> None:
    """True for the model's own continuation, false with its last token changed."""
    model = load(tmp_path)
    context = [10, 20, 30]
    written: list[int] = []
    for _ in range(4):
        with torch.inference_mode():
            written.append(int(model(torch.tensor([context + written])).logits[0, -1].argmax()))
    changed = [*written[:-1], (written[-1] + 1) % 256]

    (_, own), (_, other) = ContinuationScorer(model).score([(context, written), (context, changed)])

    assert own
    assert not other


def test_what_exceeds_the_context_loses_its_beginning(tmp_path: Path) -> None:
    """The last tokens that fit are scored; a continuation that does not fit at all is refused."""
    model = load(tmp_path)
    context = torch.randint(0, 256, (MAX_POSITIONS + 40,)).tolist()

    ((cut, _),) = ContinuationScorer(model).score([(context, [5, 6])])

    assert cut == pytest.approx(plain(model, context[-(MAX_POSITIONS - 1) :], [5, 6])[0], rel=1e-4)
    with pytest.raises(EvaluationError, match="does not fit"):
        ContinuationScorer(model).score([([1], [2] * (MAX_POSITIONS + 1))])


def test_broken_logits_are_refused(tmp_path: Path) -> None:
    """A NaN would otherwise answer every question with the first choice."""
    model = load(tmp_path)
    model.model.norm.weight.data[0] = torch.nan

    with pytest.raises(EvaluationError, match="not finite"):
        ContinuationScorer(model).score([([1, 2], [3])])

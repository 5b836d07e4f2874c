"""Live accuracy: real sequences are scored against the original, in a process whose death disturbs nobody."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from onebit_core.artifact.reader import load_model
from onebit_core.model.loading import load_original
from service.accuracy.scorer import LiveScorer
from service.accuracy.types import ScorerConfig
from service.metrics import Metrics
from tests.support.quantized import quantize_tiny

MODEL = "tiny"
PROMPT = list(b"The captain looked at the lights of the town.")
COMPLETION = list(b" It was late.")
LONGEST_WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def artifact(tiny_llama, tmp_path_factory):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("live") / "artifact", "svid")


class Scoring:
    """A scorer of everything, and what it counted."""

    def __init__(self, artifact: Path, *, queue_length: int = 8, **config) -> None:
        self.metrics = Metrics()
        self.scorer = LiveScorer(
            ScorerConfig(artifact=str(artifact), **config),
            share=1.0,
            metrics=self.metrics.live,
            model=MODEL,
            queue_length=queue_length,
        )

    def __getitem__(self, name: str) -> float:
        return self.value(name)

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"onebit_live_{name}", {"model": MODEL, **labels}) or 0.0

    async def until(self, name: str, value: float) -> None:
        async with asyncio.timeout(LONGEST_WAIT_SECONDS):
            while self[name] < value:
                await asyncio.sleep(0.02)


def compared(artifact: Path, original: Path, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and agreement at each position, by torch's own kl_div over whole logits."""
    ids = torch.tensor([tokens])
    served = load_model(artifact).model
    with torch.inference_mode():
        log_p_TV = load_original(str(original), dtype=served.dtype)[0](input_ids=ids).logits[0, :-1].log_softmax(-1)
        log_q_TV = served(input_ids=ids).logits[0, :-1].log_softmax(-1)
    divergence_T = F.kl_div(log_q_TV, log_p_TV, log_target=True, reduction="none").sum(-1)
    return divergence_T, log_p_TV.argmax(-1) == log_q_TV.argmax(-1)


def test_figures_are_those_of_the_two_models(artifact, tiny_llama):
    """KL and agreement, apart for prompt and completion, computed by other means; long sequences keep their end."""
    cut = 20

    async def story():
        scoring = Scoring(artifact, max_tokens=cut, original=str(tiny_llama))
        scoring.scorer.offer(PROMPT, COMPLETION)
        await scoring.until("scored_sequences_total", 1)
        assert scoring["scorer_up"] == 1
        pid = scoring.scorer.pid
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
        await scoring.scorer.stop()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        return scoring

    scoring = asyncio.run(story())
    divergence_T, agreement_T = compared(artifact, tiny_llama, (PROMPT + COMPLETION)[-cut:])
    parts = {"completion": slice(-len(COMPLETION), None), "prompt": slice(None, -len(COMPLETION))}
    for positions, part in parts.items():
        expected, agreeing = divergence_T[part], agreement_T[part]
        count = scoring.value("kl_divergence_nats_count", positions=positions)
        assert count == len(expected)
        total = scoring.value("kl_divergence_nats_sum", positions=positions)
        assert total == pytest.approx(float(expected.sum()), rel=0.1)  # the scorer may compute in bfloat16
        agrees = scoring.value("top1_agreement_total", positions=positions, agrees="yes")
        assert agrees == pytest.approx(int(agreeing.sum()), abs=1)
        assert agrees + scoring.value("top1_agreement_total", positions=positions, agrees="no") == len(expected)
        recent = scoring.value("recent_kl_nats", positions=positions, statistic="max")
        assert recent == pytest.approx(float(expected.max()), rel=0.1)


def test_a_dead_scorer_is_replaced(artifact):
    """Killed in between or over a sequence, it comes back; what it died under is counted and not tried again."""

    async def story():
        scoring = Scoring(artifact)
        scoring.scorer.offer(PROMPT, COMPLETION)
        await scoring.until("scored_sequences_total", 1)
        os.kill(scoring.scorer.pid, signal.SIGKILL)
        await scoring.until("scorer_restarts_total", 1)
        scoring.scorer.offer(PROMPT, COMPLETION)
        await scoring.until("scored_sequences_total", 2)
        os.kill(scoring.scorer.pid, signal.SIGSTOP)
        scoring.scorer.offer(PROMPT, COMPLETION)
        await asyncio.sleep(0.2)
        os.kill(scoring.scorer.pid, signal.SIGKILL)
        await scoring.until("failed_sequences_total", 1)
        assert scoring["scorer_up"] == 0
        await scoring.scorer.stop()
        assert scoring["scored_sequences_total"] == 2

    asyncio.run(story())


def test_an_original_that_is_gone_is_an_error_in_the_log(artifact, caplog):
    """The scorer says why it cannot load, is tried again later, and what waits is dropped and counted."""

    async def story():
        scoring = Scoring(artifact, original=str(artifact), queue_length=2)
        for _ in range(5):
            scoring.scorer.offer(PROMPT, COMPLETION)
        assert scoring["dropped_sequences_total"] == 3
        async with asyncio.timeout(LONGEST_WAIT_SECONDS):
            while "could not load" not in caplog.text:
                await asyncio.sleep(0.02)
        await scoring.scorer.stop()
        assert scoring["scorer_up"] == 0

    asyncio.run(story())
    assert "already quantized; give the original" in caplog.text
    assert str(PROMPT[:5])[1:-1] not in caplog.text, "no tokens of anybody in the log"

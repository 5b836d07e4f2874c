"""Which sequences are scored: a share of them, chosen by their ids alone, and only finished ones."""

import asyncio

import pytest

from service.accuracy.scorer import is_chosen
from service.engine.types import FinishReason, GenerationRequest, SamplingParams
from service.errors import GenerationFailed, ShuttingDown
from service.metrics import Metrics
from service.registry.registry import ModelRegistry
from service.settings import Settings
from tests.support.keeping_scorer import KeepingScorer
from tests.support.paper_artifact import write_paper_artifact
from tests.support.scripted_engine import Script, ScriptedStarter

IDS = [f"{number:x}-0" for number in range(20_000)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_the_share_is_kept(share):
    """Of many ids about the share is chosen; none of 0, all of 1."""
    chosen = sum(is_chosen(one, share) for one in IDS)
    assert chosen == pytest.approx(share * len(IDS), abs=200 if 0 < share < 1 else 0)


def test_a_larger_share_chooses_the_same_and_more():
    """The choice is the id's: asking twice, or another replica, gives the same answer."""
    few = {one for one in IDS if is_chosen(one, 0.01)}
    assert few
    assert few < {one for one in IDS if is_chosen(one, 0.1)}


def run(tmp_path, script: Script, share: float = 1.0):
    """Generate one sequence with a scripted engine; return what the scorer was offered."""
    taken = KeepingScorer(share)

    async def story():
        artifact = write_paper_artifact(tmp_path / "paper")
        registry = ModelRegistry(Settings(artifacts=["x"]), Metrics(), ScriptedStarter(script))
        model = await registry.load(artifact)
        assert model.scorer is None, "nothing is scored unless it is asked for"
        model.scorer = taken
        request = GenerationRequest(request_id="1-0", prompt_token_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=9))
        try:
            async for _ in model.generate(request):
                pass
        except (GenerationFailed, ShuttingDown):
            pass
        await registry.stop()

    asyncio.run(story())
    return taken.sequences


def test_a_finished_sequence_is_offered_whole(tmp_path):
    """Prompt and completion, as token ids, once."""
    assert run(tmp_path, Script()) == [((5, 6, 7), [0, 1, 2])]


@pytest.mark.parametrize("finish", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_failed_sequence_is_not_scored(tmp_path, finish):
    """What ended with an error or was left says nothing of the model."""
    assert run(tmp_path, Script(finish=finish)) == []


def test_what_is_not_chosen_is_not_offered(tmp_path):
    """A share of nothing costs nothing."""
    assert run(tmp_path, Script(), share=0.0) == []


def test_a_model_whose_original_is_gone_is_served_without(tmp_path, caplog):
    """A share that cannot be scored is a line in the log, not a failed load."""

    async def story():
        artifact = write_paper_artifact(tmp_path / "paper")
        registry = ModelRegistry(Settings(artifacts=["x"], score_share=0.1), Metrics(), ScriptedStarter())
        model = await registry.load(artifact)
        assert model.scorer is None
        await registry.stop()

    asyncio.run(story())
    assert "name one with --score-original" in caplog.text


def test_a_scorer_is_told_what_the_settings_say(tmp_path):
    """The original of the model's own name, the limits, and no process before the first sequence."""
    settings = Settings(
        artifacts=["x"], score_share=1.0, score_original=[f"paper={tmp_path}"], score_max_tokens=9, score_threads=2
    )

    async def story():
        artifact = write_paper_artifact(tmp_path / "paper")
        metrics = Metrics()
        registry = ModelRegistry(settings, metrics, ScriptedStarter())
        scorer = (await registry.load(artifact)).scorer
        assert (await registry.load(artifact, "other")).scorer is None, "no original is named for that one"
        assert (scorer.config.original, scorer.config.artifact) == (str(tmp_path), str(artifact))
        assert (scorer.config.max_tokens, scorer.config.num_threads, scorer.config.device) == (9, 2, "cpu")
        assert scorer.pid is None
        assert metrics.registry.get_sample_value("onebit_live_scorer_up", {"model": "paper"}) == 0
        await registry.stop()

    asyncio.run(story())

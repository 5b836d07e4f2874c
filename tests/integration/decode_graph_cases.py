"""Recorded decode steps against plain ones, under Triton's interpreter; run by test_decode_graphs.py.

There are no CUDA graphs here: a recording runs its function again. What is proved is everything around them: that the
fixed tensors hold the step and nothing of the one before, that rows which only fill a bucket disturb nobody, and that
the same tokens come out whether steps are recorded or not. Not to the last bit: torch's products on a CPU are rounded
in another way for another number of rows.
"""

import numpy as np
import pytest
import triton

from service.engine import graphs
from service.engine.types import GenerationRequest, SamplingParams
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.tiny_model import save_tiny_model

assert triton.knobs.runtime.interpret, "run by test_decode_graphs.py"
PROMPTS = [list(range(5, 8 + 7 * index)) for index in range(4)]


def results(engine, *, length=4):
    requests = [greedy(index, prompt, length + index, logprobs=2) for index, prompt in enumerate(PROMPTS)]
    return engine.run(requests)


def assert_same(recorded, plain):
    assert [result.token_ids for result in recorded] == [result.token_ids for result in plain]
    for one, other in zip(recorded, plain, strict=True):
        assert [row.logprob for row in one.logprobs] == pytest.approx([row.logprob for row in other.logprobs], abs=1e-4)


def engine_on(folder, *, decode_graphs, **config):
    return InlineEngine(folder, decode_graphs=decode_graphs, max_num_sequences=3, fuse=False, **config)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_recorded_steps_give_the_same_tokens(tmp_path, architecture):
    """Crowds that shrink from three rows to one, windows, soft caps, prompts in chunks between the steps."""
    folder = save_tiny_model(tmp_path, architecture=architecture)
    plain, recorded = (engine_on(folder, decode_graphs=on, max_batched_tokens=24) for on in (False, True))
    assert "decode graphs" in recorded.info.backend
    assert "decode graphs" not in plain.info.backend
    assert_same(results(recorded), results(plain))


def test_most_steps_are_replayed(tmp_path, monkeypatch):
    """All that give each sequence one token; those with a chunk of a prompt are not."""
    engine = engine_on(save_tiny_model(tmp_path), decode_graphs=True)
    seen = []
    replay = graphs.DecodeGraphs.replay

    def noting(self, batch):
        found = replay(self, batch)
        seen.append((bool(batch.prefill_parts), found is not None))
        return found

    monkeypatch.setattr(graphs.DecodeGraphs, "replay", noting)
    results(engine)
    assert set(seen) == {(True, False), (False, True)}


def test_longer_sequences_take_the_recording_of_more_keys(tmp_path, monkeypatch):
    """One bucket for short contexts, one for the longest."""
    monkeypatch.setattr(graphs, "FIRST_KEYS", 32)
    folder = save_tiny_model(tmp_path)
    recorded, plain = (engine_on(folder, decode_graphs=on, max_model_len=96) for on in (True, False))
    assert len(recorded.runner._graphs) == 2 * len(graphs.row_buckets(3))
    assert_same(results(recorded, length=8), results(plain, length=8))


def test_what_would_take_too_much_memory_is_not_recorded(tmp_path, monkeypatch):
    """And is computed as before."""
    monkeypatch.setattr(graphs, "MOST_PART_BYTES", 2 * 2 * 4 * 16 * (16 + 2))  # two rows of two heads
    folder = save_tiny_model(tmp_path)
    recorded, plain = (engine_on(folder, decode_graphs=on, max_model_len=96) for on in (True, False))
    assert 0 < len(recorded.runner._graphs) < len(graphs.row_buckets(3))
    assert_same(results(recorded), results(plain))


def test_sequences_that_start_over_write_what_they_wrote(tmp_path):
    """Too few pages for all at once."""
    folder = save_tiny_model(tmp_path)
    plain = engine_on(folder, decode_graphs=False)
    crowded = engine_on(folder, decode_graphs=True, kv_cache_bytes=4 << 13, max_model_len=48)
    assert_same(results(crowded, length=12), results(plain, length=12))
    assert crowded.stats.num_preemptions > 0


def test_what_the_head_read_is_of_the_right_rows(tmp_path):
    """Prompts of one token to embed beside each other: three, then one, in recorded steps."""
    folder = save_tiny_model(tmp_path)
    sampling = SamplingParams(max_tokens=0)
    requests = [
        GenerationRequest(request_id=str(token), prompt_token_ids=(token,), sampling=sampling, embed=True)
        for token in (7, 8, 9, 10)
    ]
    recorded, plain = (
        [np.frombuffer(result.embedding, "<f4") for result in engine_on(folder, decode_graphs=on).run(requests)]
        for on in (True, False)
    )
    for one, other in zip(recorded, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_recording_that_is_wrong_is_not_served(tmp_path, monkeypatch):
    """The self check compares a recorded step with a plain one."""
    fill = graphs.DecodeGraphs._fill

    def at_the_wrong_place(self, group, batch, rows):
        fill(self, group, batch, rows)
        self._positions_1B.add_(3)

    monkeypatch.setattr(graphs.DecodeGraphs, "_fill", at_the_wrong_place)
    with pytest.raises(Exception, match="self check"):
        engine_on(save_tiny_model(tmp_path), decode_graphs=True)

"""Any mixture of requests, aborts and preemptions leaves every output equal to its solo run, and the pool full."""

import json
import random
import re

import jsonschema
import pytest

from service.engine.types import FinishReason, GenerationRequest, Grammar, SamplingParams
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.tiny_model import EOS_ID, save_tiny_model

pytestmark = pytest.mark.integration

NUM_REQUESTS = 32
SMALL_POOL = {"kv_cache_bytes": 1 << 17, "max_model_len": 128}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}}, "required": ["a", "b"]}
EXPRESSION = "[ab]{2,6}c"
GRAMMARS = (
    Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
    Grammar(kind="regex", text=EXPRESSION),
    Grammar(kind="ebnf", text='root ::= "(" root ")" | "."'),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def some_request(numbers, index):
    """Return a request that asks for a few of everything."""

    def maybe(chance, value, default):
        return value if numbers.random() < chance else default

    max_tokens = numbers.randrange(1, 25)
    grammar = maybe(0.25, numbers.choice(GRAMMARS), None)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=maybe(0.8, numbers.uniform(0.3, 2), 0.0),
        top_p=maybe(0.5, numbers.uniform(0.2, 1), 1.0),
        top_k=maybe(0.3, numbers.randrange(1, 200), 0),
        min_p=maybe(0.3, numbers.uniform(0, 0.3), 0.0),
        frequency_penalty=maybe(0.3, numbers.uniform(-1, 2), 0.0),
        presence_penalty=maybe(0.3, numbers.uniform(-1, 2), 0.0),
        repetition_penalty=maybe(0.3, numbers.uniform(0.8, 1.5), 1.0),
        logit_bias=maybe(0.3, ((EOS_ID, 5.0), (65, -3.0)), ()),
        min_tokens=maybe(0.3, numbers.randrange(max_tokens + 1), 0),
        seed=index,
        stop=maybe(0.3, ("e", "t "), ()),
        include_stop=maybe(0.5, True, False),
        stop_token_ids=maybe(0.3, (66, 290), ()),
        ignore_eos=grammar is None and maybe(0.5, True, False),
        logprobs=maybe(0.5, numbers.randrange(6), None),
        prompt_logprobs=maybe(0.3, numbers.randrange(4), None),
        grammar=grammar,
    )
    prompt = [numbers.randrange(256) for _ in range(numbers.randrange(1, 90))]
    return GenerationRequest(
        request_id=f"request-{index}",
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        priority=maybe(0.2, numbers.randrange(-1, 2), 0),
    )


def assert_same(result, solo):
    """Compare what two runs gave: tokens and text equal, log probabilities up to rounding."""
    assert (result.token_ids, result.text, result.finish_reason) == (solo.token_ids, solo.text, solo.finish_reason)
    assert (result.prompt_logprobs is None) == (solo.prompt_logprobs is None)
    reports = [*result.logprobs, *(result.prompt_logprobs or ())]
    for report, expected in zip(reports, [*solo.logprobs, *(solo.prompt_logprobs or ())], strict=True):
        if expected is not None:
            assert report.token_id == expected.token_id
            assert report.logprob == pytest.approx(expected.logprob, abs=1e-3)
            values = [value for _, value in report.top]
            assert values == pytest.approx([value for _, value in expected.top], abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_output_equals_its_solo_run(folder, seed):
    """In one batch, in a small pool with aborted neighbours, and backwards in small steps."""
    numbers = random.Random(seed)
    requests = [some_request(numbers, index) for index in range(NUM_REQUESTS)]
    aborted = [greedy(1000 + index, [7] * 40, 60) for index in range(4)]
    engine = InlineEngine(folder)
    alone = [engine.run([request])[0] for request in requests]
    assert {result.finish_reason for result in alone} == {FinishReason.STOP, FinishReason.LENGTH}

    crowded = InlineEngine(folder, **SMALL_POOL)
    crowded.abort_after = {request.request_id: 3 for request in aborted}
    in_steps = InlineEngine(folder, **SMALL_POOL, max_batched_tokens=17)
    runs = [engine.run(requests), crowded.run([*aborted, *requests])[4:], in_steps.run(requests[::-1])[::-1]]
    assert crowded.stats.num_preemptions > 0
    for results, used in zip(runs, (engine, crowded, in_steps), strict=True):
        assert used.stats.kv_cache_usage == 0
        assert used.stats.num_failed_steps == 0
        for result, solo in zip(results, alone, strict=True):
            assert_same(result, solo)


def constrained(index, grammar, **sampling):
    options = {"max_tokens": 100, "temperature": 1.0, "seed": index, **sampling}
    return GenerationRequest(
        request_id=f"grammar-{index}", prompt_token_ids=(5, 6), sampling=SamplingParams(**options, grammar=grammar)
    )


def test_grammars_hold_for_many_seeds(folder):
    """Whatever a random model would like to say, in a batch of all kinds."""
    requests = [constrained(index, GRAMMARS[index % 3], max_tokens=120) for index in range(48)]
    results = InlineEngine(folder).run(requests)
    ended = [result.finish_reason == FinishReason.STOP for result in results]
    assert sum(ended[0::3]) >= 8
    assert sum(ended[1::3]) == 16
    for index, result in enumerate(results):
        if ended[index] and index % 3 == 0:
            jsonschema.validate(json.loads(result.text), SCHEMA)
        elif index % 3 == 1:
            assert re.fullmatch(EXPRESSION, result.text)
        elif ended[index]:
            assert result.text == "(" * (len(result.text) // 2) + "." + ")" * (len(result.text) // 2)


def test_the_grammar_wins_over_min_tokens(folder):
    """When the text is complete, it ends, for there is nothing else to say."""
    result = InlineEngine(folder).run([constrained(0, Grammar(kind="regex", text="abc"), min_tokens=50)])[0]
    assert (result.text, result.finish_reason) == ("abc", FinishReason.STOP)


def test_a_grammar_that_fails_fails_its_own_request(folder):
    """Refused by the compiler, or without a token to go on with; the neighbours get what they get alone."""
    engine = InlineEngine(folder)
    healthy = [greedy(index, [index + 1] * 9, 12) for index in range(3)]
    alone = [engine.run([request])[0] for request in healthy]
    bad = [
        constrained(7, Grammar(kind="regex", text="(a")),
        constrained(8, Grammar(kind="ebnf", text='root ::= root "a"')),
    ]
    *together, refused, stuck = engine.run([*healthy, *bad])
    assert (refused.finish_reason, stuck.finish_reason) == (FinishReason.ERROR, FinishReason.ERROR)
    assert "cannot be compiled" in refused.error
    assert "no token that continues" in stuck.error
    assert together == alone
    assert engine.stats.kv_cache_usage == 0
    assert engine.stats.num_failed_steps == 0


def test_a_request_may_leave_while_its_grammar_is_compiled(folder):
    """It ends at once with ABORT, others with grammars go on, and its id can be used again."""
    engine = InlineEngine(folder)
    compile_grammar = engine.loop._desk._compile_grammar

    def slow(grammar):
        if grammar is GRAMMARS[2]:
            engine.leave("grammar-0")
        return compile_grammar(grammar)

    engine.loop._desk._compile_grammar = slow
    left, other = engine.run([constrained(0, GRAMMARS[2]), constrained(1, GRAMMARS[1])])
    assert (left.finish_reason, left.token_ids) == (FinishReason.ABORT, [])
    assert other.finish_reason == FinishReason.STOP
    assert engine.run([constrained(0, GRAMMARS[1])])[0].finish_reason == FinishReason.STOP

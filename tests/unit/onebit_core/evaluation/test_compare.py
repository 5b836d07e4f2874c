"""A comparison of whole models: equal to the plain computation, however it is cut up."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, Gemma2ForCausalLM, GraniteConfig

from onebit_core.errors import Cancelled, EvaluationError
from onebit_core.evaluation.compare import evaluate_models
from onebit_core.evaluation.logits import LogitsReader
from onebit_core.evaluation.windows import TokenWindows
from onebit_core.progress import ProgressEvent, Watch
from tests.support.tiny_model import ARCHITECTURES, save_tiny_model

WINDOWS, LENGTH = 3, 70  # more than one slice of positions, and a last slice that is shorter


@pytest.fixture
def tokens() -> TokenWindows:
    tokens_WT = torch.randint(0, 256, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return TokenWindows.of("random", tokens_WT)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(folder, **options)).eval()


@pytest.fixture
def original(tmp_path: Path) -> Any:
    return load(tmp_path / "original")


@pytest.fixture
def other(tmp_path: Path) -> Any:
    return load(tmp_path / "other", seed=1)


def test_a_model_has_not_lost_anything_against_itself(original: Any, tokens: TokenWindows) -> None:
    """Equal perplexity, no divergence, full agreement."""
    result = evaluate_models(original, {"same": original}, tokens)["same"]

    assert result.compressed == result.original
    assert (result.kl_mean, result.kl_max, result.kl_standard_error) == (0, 0, 0)
    assert result.top1_agreement == 1


def test_perplexity_is_transformers_own(original: Any, other: Any, tokens: TokenWindows) -> None:
    """The exponential of the mean of the losses transformers reports, for both models."""
    result = evaluate_models(original, {"other": other}, tokens)["other"]

    for model, measured in ((original, result.original), (other, result.compressed)):
        with torch.inference_mode():
            losses = [model(window[None], labels=window[None]).loss.item() for window in tokens.tokens_WT]
        assert measured.value == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-5)


def test_divergence_is_that_of_the_complete_logits(original: Any, other: Any, tokens: TokenWindows) -> None:
    """Mean and largest KL, and agreement, computed at once from both models' complete logits."""
    result = evaluate_models(original, {"other": other}, tokens)["other"]

    with torch.inference_mode():
        p, q = (F.log_softmax(model(tokens.tokens_WT).logits[:, :-1], -1) for model in (original, other))
    divergence_WT = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert result.kl_mean == pytest.approx(divergence_WT.mean().item(), rel=1e-4)
    assert result.kl_max == pytest.approx(divergence_WT.max().item(), rel=1e-4)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert result.tokens == divergence_WT.numel()


def test_slices_do_not_change_the_result(original: Any, other: Any, tokens: TokenWindows) -> None:
    """One slice a window or 7 positions a slice: the same numbers."""
    results = [
        evaluate_models(original, {"other": other}, tokens, positions_per_slice=positions)["other"]
        for positions in (LENGTH, 7)
    ]

    whole, sliced = results
    assert sliced.kl_mean == pytest.approx(whole.kl_mean, rel=1e-6)
    assert sliced.compressed.value == pytest.approx(whole.compressed.value, rel=1e-6)


def test_candidates_together_equal_candidates_alone(original: Any, other: Any, tokens: TokenWindows) -> None:
    """Sharing the original's logits does not mix the candidates up."""
    together = evaluate_models(original, {"same": original, "other": other}, tokens)
    alone = evaluate_models(original, {"other": other}, tokens)

    assert list(together) == ["same", "other"]
    assert together["other"].kl_mean == alone["other"].kl_mean
    assert together["same"].kl_mean == 0


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_hidden_states_and_head_give_the_models_logits(tmp_path: Path, architecture: str) -> None:
    """Read in slices, the logits are those of the model's forward pass, for every architecture."""
    model = load(tmp_path, architecture=architecture)
    tokens_T = torch.arange(20)
    reader = LogitsReader(model, tokens_T)
    reader.start(tokens_T)

    read_TV = torch.cat([reader.read(0, 13), reader.read(13, 20)])

    with torch.inference_mode():
        torch.testing.assert_close(read_TV, model(tokens_T[None]).logits[0])


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5),
        GraniteConfig(**SIZES, logits_scaling=7.0),
        CohereConfig(**SIZES, logit_scale=0.1),
    ],
    ids=["capped", "divided", "multiplied"],
)
def test_what_a_model_does_to_its_logits_is_done_to_a_slice_of_them(config: Any) -> None:
    """Hidden states and head alone would miss it; a window's logits need not be whole for it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokens_T = torch.arange(20)
    reader = LogitsReader(model, tokens_T)
    reader.start(tokens_T)

    assert not reader.keeps_logits
    with torch.inference_mode():
        read_TV = torch.cat([reader.read(0, 13), reader.read(13, 20)])
        torch.testing.assert_close(read_TV, model(tokens_T[None]).logits[0])
        plain_TV = model.get_output_embeddings()(model.base_model(tokens_T[None])[0][0])
        assert not torch.allclose(read_TV, plain_TV)


class Shifted(Gemma2ForCausalLM):
    """Adds to logits what it makes of the text itself, which no slice of states tells."""

    def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
        output = super().forward(input_ids=input_ids, **given)
        output.logits = output.logits + input_ids[..., None]
        return output


def test_logits_of_more_than_states_are_kept_whole() -> None:
    torch.manual_seed(0)
    model = Shifted(Gemma2Config(**SIZES, head_dim=16)).eval()
    tokens_T = torch.arange(20)
    reader = LogitsReader(model, tokens_T)
    reader.start(tokens_T)

    assert reader.keeps_logits
    with torch.inference_mode():
        torch.testing.assert_close(reader.read(0, 20), model(tokens_T[None]).logits[0])


def test_broken_logits_name_model_and_window(original: Any, tokens: TokenWindows) -> None:
    """A NaN weight is reported as what it is, not as a strange perplexity."""
    broken = copy.deepcopy(original)
    broken.model.norm.weight.data[0] = torch.nan

    with pytest.raises(EvaluationError, match="logits of broken are not finite in window 0"):
        evaluate_models(original, {"broken": broken}, tokens)


def test_a_window_beyond_the_context_is_refused(original: Any) -> None:
    """Perplexity beyond the trained context would measure something else."""
    with pytest.raises(EvaluationError, match="window of 600 tokens is longer than the context"):
        evaluate_models(original, {"same": original}, TokenWindows.of("long", torch.zeros(1, 600, dtype=torch.int64)))


def test_another_vocabulary_is_refused(tmp_path: Path, original: Any, tokens: TokenWindows) -> None:
    """Distributions over different vocabularies have no divergence."""
    wider = load(tmp_path / "wider", vocab_size=330)

    with pytest.raises(EvaluationError, match="vocabulary of 330"):
        evaluate_models(original, {"wider": wider}, tokens)


def test_progress_counts_windows_and_cancel_stops_it(original: Any, tokens: TokenWindows) -> None:
    """One event a window; a token set after the first window ends the run there."""
    events: list[ProgressEvent] = []
    watch = Watch(sink=events.append)
    evaluate_models(original, {"same": original}, tokens, watch)
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("evaluate", done, WINDOWS) for done in range(WINDOWS + 1)
    ]

    watch.cancel.cancel()
    with pytest.raises(Cancelled):
        evaluate_models(original, {"same": original}, tokens, watch)


class Live(TorchDispatchMode):
    """Watches every tensor that operations make: how many bytes are alive at most, and how many rows of V logits."""

    def __init__(self, vocabulary: int, *models: Any) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.most_logits = 0
        self._vocabulary = vocabulary
        self._weights = {parameter.untyped_storage().data_ptr() for m in models for parameter in m.parameters()}
        self._alive: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._weights:
                key = id(tensor)
                self._alive[key] = weakref.ref(tensor, lambda _, key=key: self._alive.pop(key, None))
                if tensor.ndim and tensor.shape[-1] == self._vocabulary:
                    self.most_logits = max(self.most_logits, tensor.numel() // self._vocabulary)
        storages = [tensor.untyped_storage() for ref in list(self._alive.values()) if (tensor := ref()) is not None]
        self.peak_bytes = max(self.peak_bytes, sum({one.data_ptr(): one.nbytes() for one in storages}.values()))
        return result


def test_logits_never_exist_beyond_a_slice_and_memory_does_not_grow_with_the_text(original: Any, other: Any) -> None:
    """Four times the windows cost the few bytes a token that results need, not their logits."""
    length, slice_length, vocabulary = 100, 16, original.config.vocab_size
    peaks = []
    for count in (4, 16):
        tokens_WT = torch.randint(0, 256, (count, length))
        with Live(vocabulary, original, other) as live:
            evaluate_models(
                original, {"other": other}, TokenWindows.of("random", tokens_WT), positions_per_slice=slice_length
            )
        assert live.most_logits == slice_length
        peaks.append(live.peak_bytes)

    logits_of_a_window = 4 * length * vocabulary
    assert peaks[0] > 4 * slice_length * vocabulary
    assert peaks[1] - peaks[0] < 12 * length * 64 < logits_of_a_window

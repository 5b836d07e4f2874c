"""What is measured: shapes of real models, presets, and the words of --only."""

import pytest

from benchmarks.kernel_bench.shapes import (
    FORMATS,
    HEAD_FORMAT,
    MODELS,
    TOKENS,
    chosen,
    find_shape,
    full_cases,
    in_groups,
    layers_of,
    quick_cases,
)


def test_layers_have_the_sizes_of_the_models():
    """Numbers from the models' config.json, written out once more."""
    sizes = {(shape.rows, shape.columns) for shape in layers_of("smollm2-135m")}
    assert sizes == {(576, 576), (192, 576), (1536, 576), (576, 1536), (960, 576), (3072, 576), (49152, 576)}
    assert {(11008, 4096), (4096, 11008), (12288, 4096)} <= {(s.rows, s.columns) for s in layers_of("llama-2-7b")}
    assert {(28672, 8192), (1024, 8192), (10240, 8192)} <= {(s.rows, s.columns) for s in layers_of("llama-3-70b")}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_quick_preset_is_a_part_of_the_full_one_and_has_the_targets(on_gpu):
    """4096x4096 and 11008x4096 at one token, in one plane, are what results are judged by."""
    quick, full = quick_cases(on_gpu=on_gpu), full_cases(on_gpu=on_gpu)
    assert len(set(quick)) == len(quick) < len(full) == len(set(full))
    assert set(quick) <= set(full)
    for shape in ("4096x4096", "11008x4096", "8192x8192"):
        assert chosen(quick, [shape, "sign", "M=1", "cold"])


def test_the_full_run_has_every_model_format_and_token_count():
    """Heads are in 8 bit, everything else in the other formats."""
    cases = full_cases(on_gpu=False)
    assert {case.shape.model for case in cases} == set(MODELS)
    assert {case.format for case in cases} == set(FORMATS)
    assert {case.tokens for case in cases} == set(TOKENS)
    assert all((case.format == HEAD_FORMAT) == (case.shape.layer == "head") for case in cases)


def test_only_takes_the_cases_of_which_every_word_is_a_label():
    """Words are labels as a whole, with * for any."""
    cases = full_cases(on_gpu=False)
    found = chosen(cases, ["llama-2-7b", "codes-*", "M=1", "hot"])
    assert {case.format for case in found} == {"codes-2", "codes-3", "codes-4"}
    assert {(case.tokens, case.cache, case.shape.model) for case in found} == {(1, "hot", "llama-2-7b")}
    assert chosen(cases, []) == cases
    assert not chosen(cases, ["M=3"])


def test_cases_of_one_weight_stay_together():
    """A weight is made once."""
    cases = quick_cases(on_gpu=False)
    groups = in_groups(cases)
    assert sum(map(len, groups.values())) == len(cases)
    assert all((case.shape, case.format) == key for key, group in groups.items() for case in group)


def test_a_shape_is_found_by_its_numbers():
    """Those of a model carry its name, others none."""
    assert (find_shape("4096x11008").model, find_shape("4096x11008").layer) == ("llama-2-7b", "down")
    assert (find_shape("100x64").rows, find_shape("100x64").model) == (100, "")
    for wrong in ("4096", "4096x", "0x64", "axb"):
        with pytest.raises(ValueError, match="ROWSxCOLUMNS"):
            find_shape(wrong)

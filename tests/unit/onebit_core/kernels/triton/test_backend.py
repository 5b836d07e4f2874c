"""What the backend says about itself, and `onebit tune`, on a machine without a GPU."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from onebit_core.cli.tune import parse_shape, parse_tokens, timings_table, tune
from onebit_core.errors import BackendUnavailable, ConfigError, KernelError
from onebit_core.kernels import triton as backend
from onebit_core.kernels.planes import LinearOperands
from onebit_core.kernels.triton import tuning, workspace
from onebit_core.kernels.triton.layout import plan_of
from onebit_core.kernels.triton.tiles import BUCKETS, Gpu, Product, Tile
from tests.support.random_operands import STRUCTURES

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


def test_importing_the_backend_imports_no_triton():
    code = "import sys, onebit_core.kernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@no_gpu
def test_without_a_gpu_the_reason_is_one_sentence():
    assert backend.why_unavailable() == "this machine has no CUDA device that PyTorch can use; use the cpu backend"


def test_packing_needs_no_gpu():
    packed = backend.pack(STRUCTURES["salient"](40, 300, "cpu"))
    assert packed.layout[:3] == (40, 300, 1)
    assert all(part.is_contiguous() for part in packed.parts)


def test_packing_refuses_what_cannot_be_multiplied():
    with pytest.raises(KernelError, match="neither planes nor bytes"):
        backend.pack(LinearOperands(out_features=4, in_features=4))
    with pytest.raises(KernelError, match="use float or int8"):
        backend.pack(STRUCTURES["sign"](4, 4, "cpu"), act="fp8")


def test_a_layout_of_another_version_is_refused():
    layout = backend.pack(STRUCTURES["sign"](4, 4, "cpu")).layout
    with pytest.raises(KernelError, match="load the model again"):
        plan_of((*layout[:3], 999, *layout[4:]))


@pytest.mark.parametrize(
    ("structure", "kind"),
    [("sign", 2), ("code of 4 bits", 2), ("code of 8 bits", 0), ("three planes", 0), ("bytes", 1)],
)
def test_int8_is_taken_where_it_exists(structure, kind):
    packed = backend.pack(STRUCTURES[structure](8, 200, "cpu"), act="int8")
    assert plan_of(packed.layout).kind == kind


def test_counters_are_per_stream_and_zero():
    device = torch.device("cpu")
    assert workspace.counters(device) is workspace.counters(device)
    assert not workspace.counters(device).any()


def test_shapes_and_tokens_are_read():
    assert parse_shape("4096,11008") == (4096, 11008, 1, 0)
    assert parse_shape("4096,4096,4") == (4096, 4096, 4, 0)
    assert parse_shape("4096,4096,4,128") == (4096, 4096, 4, 128)
    assert parse_tokens("8,1,8") == [1, 8]


@pytest.mark.parametrize("text", ["4096", "a,b", "0,5", "4,4,9", "100,100,1,64", "1,2,3,4,5"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ConfigError, match="--shape"):
        parse_shape(text)


@pytest.mark.parametrize("text", ["", "0", "x"])
def test_other_tokens_are_refused(text):
    with pytest.raises(ConfigError, match="--m"):
        parse_tokens(text)


def test_tune_wants_one_source_of_shapes():
    with pytest.raises(ConfigError, match="either an ARTIFACT or --shape"):
        tune(artifact=None, shape=[], tokens="1")


@no_gpu
def test_tune_without_a_gpu_says_so():
    with pytest.raises(BackendUnavailable, match="tune: this machine has no CUDA device"):
        tune(artifact=None, shape=["64,64"], tokens="1")


@pytest.mark.parametrize("tokens", BUCKETS)
def test_candidates_begin_with_the_rule_and_repeat_nothing(tokens):
    found = tuning.candidates(Gpu("H100", 90, 132), Product("planes", 4096, 4096, 1, 0, "bf16"), tokens)
    assert 10 <= len(found) <= 150
    assert len(set(found)) == len(found)


def test_results_become_entries_and_a_table():
    product = Product("planes", 64, 64, 1, 0, "bf16")
    tile = Tile(64, 8, 128, 4, 4, 2)
    timings = [
        tuning.Timing(product, 64, tile, 5.0, 6.0, 4.0),
        tuning.Timing(product, 128, tile, 9.0, 9.0, 4.0),
        tuning.Timing(product, 1, tile, 1.0, 1.0, None),
    ]
    entries = tuning.entries_of(timings)
    assert entries[product.key(1)] == [64, 8, 128, 4, 4, 2]
    assert entries["dense_from," + product.key(0)] == [64]
    assert timings_table(timings).row_count == 3

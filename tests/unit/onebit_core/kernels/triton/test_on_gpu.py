"""The GPU kernels on a GPU: against the dense weight in float64, in CUDA graphs, on several streams, in large sizes."""

import pytest
import torch

pytest.importorskip("triton")

from onebit_core.kernels import triton as backend
from onebit_core.kernels.packing import num_words
from onebit_core.kernels.planes import LinearOperands, PlaneTerm
from onebit_core.kernels.triton import launch, tiles, tuning
from onebit_core.kernels.triton.layout import parts_of, plan_of
from tests.support.random_operands import STRUCTURES, error_of, grouped, plane_term

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backend.why_unavailable() is not None, reason=str(backend.why_unavailable())),
]

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def check(operands, tokens, dtype=torch.bfloat16):
    packed = backend.pack(operands)
    x = torch.randn(tokens, operands.in_features).to(dtype).cuda()
    y = backend.matmul(x, packed.parts, packed.layout)
    assert y.dtype == dtype
    assert y.shape == (tokens, operands.out_features)
    if tokens:
        assert error_of(y, x, operands) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_product_equals_the_dense_weight(structure, dtype):
    for rows, columns in ((1000, 1024), (70, 300)):
        operands = STRUCTURES[structure](rows, columns, "cuda")
        for tokens in (0, 1, 7, 16, 33, 129, 300):
            check(operands, tokens, dtype)


@pytest.mark.parametrize("code", [False, True])
@pytest.mark.parametrize("group_size", [16, 20, 32, 64, 96, 128, 256])
def test_groups_of_any_size(group_size, code):
    operands = grouped(200, group_size, "cuda", code=code)
    for tokens in (1, 16, 33):
        for dtype in (torch.bfloat16, torch.float32):
            check(operands, tokens, dtype)


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (33, 8), (17, 1), (64, 257), (4096, 4096), (2049, 11008)])
def test_shapes(rows, columns):
    for tokens in (1, 8, 64):
        check(STRUCTURES["sign with shift and bias"](rows, columns, "cuda"), tokens)


def test_integers_are_exact_and_every_tile_agrees():
    """Sums of small integers are exact in every order: bit for bit, for all tiles `onebit tune` would try."""
    operands = LinearOperands(out_features=500, in_features=2048, planes=(plane_term(500, 2048, device="cuda"),))
    words = operands.planes[0].words_QOW
    ones = torch.ones(1, 500, 1, device="cuda")
    term = PlaneTerm(words_QOW=words, coefficient_COG=-2 * ones, offset_OG=ones[0])
    operands = LinearOperands(out_features=500, in_features=2048, planes=(term,))
    packed = backend.pack(operands)
    plan = plan_of(packed.layout)
    gpu = tiles.gpu_of(torch.device("cuda", 0))
    for tokens in (1, 9, 40):
        x = torch.randint(-8, 9, (tokens, 2048)).half().cuda()
        for tile in tuning.candidates(gpu, launch.product_of(plan, x.dtype), tokens):
            y = launch.packed_matmul(x, parts_of(plan, packed.parts), plan, tile)
            assert error_of(y, x, operands) == 0, tile


def test_splits_are_deterministic():
    operands = STRUCTURES["sign with input scale"](512, 8192, "cuda")
    packed = backend.pack(operands)
    x = torch.randn(3, 8192, device="cuda", dtype=torch.bfloat16)
    first = backend.matmul(x, packed.parts, packed.layout)
    assert all(torch.equal(first, backend.matmul(x, packed.parts, packed.layout)) for _ in range(200))


@pytest.mark.parametrize("structure", ["sign with input scale", "salient", "bytes", "three planes"])
@pytest.mark.parametrize("tokens", [1, 20, 600])
def test_products_can_be_captured_and_replayed(structure, tokens):
    """A graph captured on its own stream gives what a call gives, again and again, with new inputs."""
    operands = STRUCTURES[structure](512, 1024, "cuda")
    packed = backend.pack(operands)
    x = torch.randn(tokens, 1024, device="cuda", dtype=torch.float16)
    backend.matmul(x, packed.parts, packed.layout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend.matmul(x, packed.parts, packed.layout)
    for _ in range(3):
        x.copy_(torch.randn(tokens, 1024))
        graph.replay()
        assert torch.equal(y, backend.matmul(x, packed.parts, packed.layout))


def test_two_streams_do_not_disturb_each_other():
    operands = STRUCTURES["sign"](256, 8192, "cuda")
    packed = backend.pack(operands)
    x = torch.randn(2, 8192, device="cuda", dtype=torch.bfloat16)
    expected = backend.matmul(x, packed.parts, packed.layout)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(backend.matmul(x, packed.parts, packed.layout))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_large_inputs_and_nan():
    operands = STRUCTURES["sign"](64, 1024, "cuda")
    packed = backend.pack(operands)
    x = torch.full((3, 1024), 1000.0, device="cuda", dtype=torch.float16)
    x[0] = 0.01
    x[1, 5] = torch.nan
    y = backend.matmul(x, packed.parts, packed.layout)
    assert y[1].isnan().all()
    assert not y[::2].isnan().any()


def test_int8_activations():
    operands = STRUCTURES["code of 4 bits"](500, 1000, "cuda")
    packed = backend.pack(operands, act="int8")
    for tokens in (1, 40, 300):
        x = torch.randn(tokens, 1000, device="cuda", dtype=torch.bfloat16)
        assert error_of(backend.matmul(x, packed.parts, packed.layout), x, operands) < 3e-2


def test_a_matrix_of_more_than_2_to_31_weights():
    """Offsets beyond 32 bits: the last rows are right."""
    rows, columns = 270_000, 8192
    free, _ = torch.cuda.mem_get_info()
    if free < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    words = torch.randint(-(2**31), 2**31 - 1, (1, rows, num_words(columns)), device="cuda").to(torch.int32)
    ones = torch.ones(1, rows, 1, device="cuda")
    whole = LinearOperands(
        out_features=rows,
        in_features=columns,
        planes=(PlaneTerm(words_QOW=words, coefficient_COG=-2 * ones, offset_OG=ones[0]),),
    )
    last = PlaneTerm(words_QOW=words[:, -64:], coefficient_COG=-2 * ones[:, -64:], offset_OG=ones[0, -64:])
    tail = LinearOperands(out_features=64, in_features=columns, planes=(last,))
    packed = backend.pack(whole)
    for tokens in (1, 600):
        x = torch.randint(-4, 5, (tokens, columns)).half().cuda()
        assert error_of(backend.matmul(x, packed.parts, packed.layout)[:, -64:], x, tail) < 1e-3


def test_tuning_measures_and_finds_a_tile():
    weight = tuning.random_weight(256, 512, 1, 0, torch.device("cuda"))
    ((product, weights),) = tuning.products_in([weight], torch.bfloat16).items()
    ticks = []
    timing = tuning.tune_product(product, weights, torch.bfloat16, 1, lambda: ticks.append(1))
    assert 0 < timing.packed_us <= timing.rule_us
    assert len(ticks) == len(tuning.candidates(tiles.gpu_of(torch.device("cuda", 0)), product, 1))
    assert product.key(1) in tuning.entries_of([timing])

"""Packed products are the reference's bit for bit: on every instruction set, batch size, thread count and data type."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels import cpu, pack_bits
from onebit_core.kernels.cpu.library import load
from onebit_core.kernels.planes import LinearOperands, PlaneTerm, dense_weight
from tests.support.packed_reference import packed_reference, random_bytes, random_sparse, random_term

if cpu.why_unavailable() is not None:
    pytest.skip(str(cpu.why_unavailable()), allow_module_level=True)

ISAS = load().ob_isa_available().decode().split(",")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Select an instruction set for one test."""
    assert load().ob_select_isa(request.param.encode()) == 0
    yield
    assert load().ob_select_isa(b"auto") == 0


each_isa = pytest.mark.usefixtures("isa")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def multiply(operands: LinearOperands, x: Tensor) -> Tensor:
    packed = cpu.pack(operands)
    return cpu.matmul(x, packed.parts, packed.layout)


def with_terms(rows: int, columns: int, *terms: PlaneTerm, **parts: object) -> LinearOperands:
    return LinearOperands(out_features=rows, in_features=columns, planes=terms, **parts)  # type: ignore[arg-type]


def one_plane(rows: int, columns: int) -> LinearOperands:
    draw = generator(rows * columns)
    return with_terms(rows, columns, random_term(draw, rows, columns, scale_in=True))


def grouped_code(planes: int, groups: int, rows: int, columns: int) -> LinearOperands:
    draw = generator(planes + groups)
    return with_terms(rows, columns, random_term(draw, rows, columns, planes=planes, groups=groups, code=True))


def several_terms(rows: int, columns: int) -> LinearOperands:
    draw = generator(7)
    return with_terms(
        rows,
        columns,
        random_term(draw, rows, columns, planes=3, groups=3, scale_in=True),
        random_term(draw, rows, columns, planes=2, offset=False),
        random_term(draw, rows, columns, planes=4, groups=3, code=True),
        random_term(draw, rows, columns, planes=0, groups=3),
        bias_O=torch.randn(rows, generator=draw),
    )


def with_sparse(density: float, rows: int, columns: int) -> LinearOperands:
    draw = generator(int(density * 1000))
    return with_terms(
        rows,
        columns,
        random_term(draw, rows, columns, scale_in=True),
        random_term(draw, rows, columns, planes=2, groups=3, code=True),
        random_term(draw, rows, columns, offset=False),
        sparse=random_sparse(draw, rows, columns, density),
        bias_O=torch.randn(rows, generator=draw),
    )


KINDS: dict[str, Callable[[], LinearOperands]] = {
    "one plane": lambda: one_plane(128, 512),
    "one row": lambda: one_plane(1, 40),
    "one column": lambda: one_plane(5, 1),
    "odd shape": lambda: one_plane(131, 419),
    "code of 2 bits, groups of 128": lambda: grouped_code(2, 4, 70, 512),
    "code of 3 bits, groups of 64": lambda: grouped_code(3, 6, 70, 384),
    "code of 4 bits, groups of 17": lambda: grouped_code(4, 5, 33, 85),
    "code of 8 bits, groups of 1500": lambda: grouped_code(8, 2, 20, 3000),
    "several terms": lambda: several_terms(100, 387),
    "bytes": lambda: random_bytes(generator(1), 100, 387),
    "sparse 0.1 %": lambda: with_sparse(0.001, 70, 600),
    "sparse 10 %": lambda: with_sparse(0.1, 70, 345),
    "sparse 60 %": lambda: with_sparse(0.6, 150, 345),
    "sparse, none": lambda: with_sparse(0.0, 70, 345),
}


@pytest.mark.parametrize("kind", KINDS)
@each_isa
def test_every_instruction_set_gives_the_bits_of_the_reference(kind: str) -> None:
    operands = KINDS[kind]()
    for tokens in (0, 1, 2, 7, 129):
        x = torch.randn(tokens, operands.in_features, generator=generator(tokens)) * 3
        assert multiply(operands, x).equal(packed_reference(operands, x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_that_of_the_dense_weight(kind: str) -> None:
    operands = KINDS[kind]()
    x = torch.randn(5, operands.in_features, generator=generator(2))
    weight = dense_weight(operands).double()
    expected = x.double() @ weight.T + (0 if operands.bias_O is None else operands.bias_O.double())
    found = multiply(operands, x).double()
    # 14-bit activations: an error of half a step = 2^-13 of the largest x, at random signs, on every weight
    noise = x.abs().max().double() * 2**-13 * weight.square().sum(-1).sqrt()
    assert ((found - expected).abs() <= 4 * noise + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_isa
def test_half_types_are_read_and_rounded_like_torch(dtype: torch.dtype) -> None:
    operands = several_terms(100, 387)
    x = torch.randn(9, 387, generator=generator(3)).to(dtype)
    x[0, :3] = torch.tensor([2.0**-24, 2.0**-15, -(2.0**-14)], dtype=dtype)
    assert multiply(operands, x).equal(packed_reference(operands, x))
    assert multiply(operands, x.float()).to(dtype).equal(multiply(operands, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_isa
def test_every_half_value_is_read_exactly_and_written_back(dtype: torch.dtype) -> None:
    """One column of 65536 tokens through a weight of 1."""
    identity = with_terms(1, 1, PlaneTerm(words_QOW=pack_bits(torch.ones(1, 1, 1, dtype=torch.bool)),
                                          coefficient_COG=torch.ones(1, 1, 1)))  # fmt: skip
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    y = multiply(identity, every)
    expected = packed_reference(identity, every)
    assert y.nan_to_num(nan=1.5).equal(expected.nan_to_num(nan=1.5))
    assert y.isnan().equal(~every.isfinite())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_isa
def test_floats_round_to_nearest_even(dtype: torch.dtype) -> None:
    """Biases of all magnitudes pass through the output conversion alone."""
    bits = torch.randint(-(2**31), 2**31 - 1, (5000,), generator=generator(4)).to(torch.int32)
    halfway = torch.arange(2**11, dtype=torch.int32) * 0x1000 + 0x38000000  # ties of float16
    bias = torch.cat([bits.view(torch.float32), halfway.view(torch.float32), torch.tensor([65519.9, 65520.0, 3.4e38])])
    rows = len(bias)
    operands = with_terms(rows, 1, random_term(generator(5), rows, 1), bias_O=bias)
    y = multiply(operands, torch.zeros(1, 1, dtype=dtype))[0]
    expected = (torch.zeros(rows) + bias).to(dtype)
    assert y.isnan().equal(expected.isnan())
    assert y.nan_to_num(nan=1.5).equal(expected.nan_to_num(nan=1.5))


@each_isa
def test_integers_come_out_exactly() -> None:
    draw = generator(6)
    codes = torch.randint(-8, 9, (3, 1000), generator=draw)
    bits = torch.rand(50, 1000, generator=draw) < 0.5
    term = PlaneTerm(words_QOW=pack_bits(bits[None]), coefficient_COG=torch.full((1, 50, 1), -2.0),
                     offset_OG=torch.ones(50, 1))  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        expected = codes @ (1 - 2 * bits.long()).T
        assert multiply(with_terms(50, 1000, term), codes.to(dtype)).equal(expected.to(dtype))


@each_isa
@pytest.mark.parametrize("planes", [1, 8])
def test_the_largest_sums_fit(planes: int) -> None:
    """All bits set, x at the limit of 14 bits, segments of 1024 columns: sums of 16 and of 32 bits are full."""
    term = PlaneTerm(
        words_QOW=pack_bits(torch.ones(planes, 70, 2048, dtype=torch.bool)),
        coefficient_COG=torch.ones(1, 70, 2),
        binary_code=True,
    )
    signs = torch.tensor([1.0, -1.0, 1.0])[:, None]
    for tokens in (1, 3, 24):
        x = (signs * 8191).repeat(tokens // 3 + 1, 2048)[:tokens]
        expected = x[:, :1] * 1024 * (2**planes - 1)
        assert multiply(with_terms(70, 2048, term), x).equal((expected + expected).expand(tokens, 70))


@each_isa
def test_a_token_does_not_depend_on_the_others() -> None:
    for operands in (several_terms(100, 387), random_bytes(generator(1), 100, 387), with_sparse(0.1, 70, 345)):
        packed = cpu.pack(operands)
        x = torch.randn(70, operands.in_features, generator=generator(8))
        whole = cpu.matmul(x, packed.parts, packed.layout)
        for token in range(0, 70, 9):
            alone = cpu.matmul(x[token : token + 1], packed.parts, packed.layout)
            assert alone.equal(whole[token : token + 1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_isa
def test_what_is_not_finite_stays_in_its_token(bad: float) -> None:
    for operands in (several_terms(100, 387), random_bytes(generator(1), 100, 387), with_sparse(0.1, 70, 345)):
        x = torch.randn(6, operands.in_features, generator=generator(9))
        clean = multiply(operands, x)
        x[2, 300] = bad
        y = multiply(operands, x)
        assert y[2].isnan().all()
        assert y[[0, 1, 3, 4, 5]].equal(clean[[0, 1, 3, 4, 5]])


@each_isa
def test_large_and_tiny_activations() -> None:
    operands = one_plane(64, 512)
    draw = generator(10)
    for scale in (1e3, 1e30, 1e-30, 1e-42, 0.0):
        x = torch.randn(4, 512, generator=draw) * scale
        assert multiply(operands, x).equal(packed_reference(operands, x))
    x16 = (torch.rand(4, 512, generator=draw) * 2000 - 1000).half()
    assert multiply(operands, x16).equal(packed_reference(operands, x16))


@each_isa
def test_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    draw = generator(11)
    operands = with_terms(
        1000, 1024, random_term(draw, 1000, 1024, planes=4, groups=8, code=True),
        sparse=random_sparse(draw, 1000, 1024, 0.1),
    )  # fmt: skip
    x = torch.randn(33, 1024, generator=draw)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(operands, x))
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1])
    assert results[0].equal(results[2])


@each_isa
def test_callers_do_not_disturb_each_other() -> None:
    """Products of different sizes at the same time: scratch memory belongs to the calling thread."""
    weights = [several_terms(100, 387), random_bytes(generator(1), 100, 387), with_sparse(0.1, 70, 345)]
    packed = [cpu.pack(operands) for operands in weights]
    xs = [torch.randn(1 + 9 * n, layer.layout[1], generator=generator(n)) for n, layer in enumerate(packed)]
    expected = [cpu.matmul(x, layer.parts, layer.layout) for x, layer in zip(xs, packed, strict=True)]

    def again(n: int) -> bool:
        return cpu.matmul(xs[n], packed[n].parts, packed[n].layout).equal(expected[n])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(again, [0, 1, 2] * 30))


@each_isa
def test_rows_of_x_may_be_far_apart() -> None:
    operands = one_plane(65, 96)
    wide = torch.randn(8, 200, generator=generator(12))
    packed = cpu.pack(operands)
    found = cpu.matmul(wide[::2, 50:146], packed.parts, packed.layout)
    assert found.equal(cpu.matmul(wide[::2, 50:146].contiguous(), packed.parts, packed.layout))


def test_a_blob_is_found_out_if_it_is_none() -> None:
    operands = one_plane(64, 64)
    packed = cpu.pack(operands)
    x = torch.randn(1, 64)
    blob = packed.parts[0]
    for wrong in (blob[:64], blob[: blob.numel() - 64], torch.zeros_like(blob), torch.zeros(0, dtype=torch.uint8)):
        with pytest.raises(KernelError, match="not a packed weight"):
            cpu.matmul(x, (wrong,), packed.layout)
    moved = torch.zeros(blob.numel() + 1, dtype=torch.uint8)[1:].copy_(blob)
    assert cpu.matmul(x, (moved,), packed.layout).equal(cpu.matmul(x, packed.parts, packed.layout))


def test_a_weight_belongs_to_its_instruction_set() -> None:
    library = load()
    assert library.ob_select_isa(b"portable") == 0
    packed = cpu.pack(one_plane(64, 64))
    assert library.ob_select_isa(b"auto") == 0
    x = torch.randn(1, 64)
    if "avx512vbmi" in cpu.describe():
        with pytest.raises(KernelError, match="packed for another instruction set"):
            cpu.matmul(x, packed.parts, packed.layout)
    assert library.ob_select_isa(b"mmx") != 0


def test_operands_that_contradict_themselves_are_refused() -> None:
    draw = generator(13)
    term = random_term(draw, 8, 64)
    sparse = random_sparse(draw, 8, 64, 0.5)
    with pytest.raises(KernelError, match="shape"):
        cpu.pack(with_terms(9, 64, term))
    short = type(sparse)(bitmap_OW=sparse.bitmap_OW, codes_N=sparse.codes_N[:-1], scale_O=sparse.scale_O,
                         zero_O=sparse.zero_O)  # fmt: skip
    with pytest.raises(KernelError, match="makes no sense"):
        cpu.pack(with_terms(8, 64, term, sparse=short))
    packed = cpu.pack(with_terms(8, 64, term))
    for x in (torch.randn(2, 63), torch.randn(2, 64, dtype=torch.float64), torch.randn(64, 2).T):
        with pytest.raises(KernelError, match="cpu kernels: x is"):
            cpu.matmul(x, packed.parts, packed.layout)

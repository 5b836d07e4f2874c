"""Packed layers: every backend agrees with the dense weight, and bytes are what was promised."""

import pytest
import torch
from torch import nn

from onebit_core.errors import BackendUnavailable, ConfigError, CorruptArtifact
from onebit_core.kernels import resolve_backend
from onebit_core.layers import (
    FactorLinear,
    GroupedIntLinear,
    LayerSpec,
    LutLinear,
    SalientWeights,
    SignLinear,
    build_layer,
    pack_layers,
    packed_bytes,
    release_stored,
    use_backend,
)
from onebit_core.layers.salient import choose_index
from tests.support.backends import CPU_BACKENDS


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def salient(rows: int, columns: int, count: int) -> SalientWeights:
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[torch.randperm(rows * columns, generator=torch.Generator().manual_seed(1))[:count]] = True
    return SalientWeights(
        mask_OI=mask.view(rows, columns),
        codes_OI=torch.arange(rows * columns).view(rows, columns) % 256,
        scale_O=torch.full((rows,), 0.5),
        zero_O=torch.full((rows,), 128),
    )


def sign_layer(weights: SalientWeights | None = None) -> SignLinear:
    return SignLinear.from_parts(
        draw(2, 6, 160),
        scale_in_PI=draw(2, 160, seed=1).abs(),
        scale_out_PO=draw(2, 6, seed=2).abs(),
        group_scale_POG=draw(2, 6, 5, seed=3).abs(),
        shift_OG=draw(6, 1, seed=4),
        salient=weights,
    )


def int_layer(weights: SalientWeights | None = None) -> GroupedIntLinear:
    codes = torch.arange(6 * 160).view(6, 160) % 8
    zero = torch.arange(12).view(6, 2) % 8
    return GroupedIntLinear.from_codes(codes, draw(6, 2, seed=5).abs(), zero, 3, weights)


def lut_layer(weights: SalientWeights | None = None) -> LutLinear:
    index = torch.arange(6 * 160).view(6, 160) * 7 % 4
    return LutLinear.from_levels(index, draw(6, 5, 4, seed=6), weights)


def factor_layer() -> FactorLinear:
    return FactorLinear.from_factors(
        draw(40, 160),
        draw(6, 40, seed=1),
        scale_in_I=draw(160, seed=2),
        scale_mid_R=draw(40, seed=3),
        scale_out_O=draw(6, seed=4),
    )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_what_lies_between_two_factors_may_be_large(backend):
    """A middle beyond the range of float16 is no overflow if the result is in range."""
    layer = FactorLinear.from_factors(
        torch.ones(32, 160),
        draw(6, 32),
        scale_in_I=torch.full((160,), 64.0),
        scale_mid_R=torch.full((32,), 64.0),
        scale_out_O=torch.full((6,), 2.0**-14),
    )
    x = torch.full((1, 160), 16.0, dtype=torch.float16)
    use_backend(layer, backend)
    expected = x.double() @ layer.dequantize().double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=2e-3, atol=0)
    assert layer(x).dtype == torch.float16


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_factor_layer_multiplies_by_the_product_of_its_factors(with_bias, backend):
    """Two sign products in a row, bias at the end, on every backend."""
    layer = factor_layer()
    bias = draw(6, seed=9)
    if with_bias:
        layer.set_bias(bias)
    x = draw(3, 160, seed=7)
    expected = x.double() @ layer.dequantize().double().T + (bias.double() if with_bias else 0)
    use_backend(layer, backend)
    largest = float(expected.abs().max())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-3 * largest)


def test_bits_of_a_factor_layer_are_set_by_its_rank():
    """(O + I) * R signs and three vectors of float16, rows padded to words."""
    layer = factor_layer()
    signs = 32 * (40 * 5 + 6 * 2)
    assert layer.bits_per_weight() == (signs + 16 * (160 + 40 + 6)) / (6 * 160)


@pytest.mark.parametrize("make", [sign_layer, int_layer, lut_layer])
@pytest.mark.parametrize("count", [0, 1, 30, 500])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_backend_multiplies_by_the_dense_weight(make, count, with_bias, backend):
    """Each gives x @ dequantize().T + bias; packed kernels round x to 14 bits within its group."""
    layer = make(salient(6, 160, count) if count else None)
    bias = draw(6, seed=9)
    if with_bias:
        layer.set_bias(bias)
    x = draw(3, 160, seed=7)
    expected = x.double() @ layer.dequantize().double().T + (bias.double() if with_bias else 0)
    use_backend(layer, backend)
    tolerance = (
        {"rtol": 1e-3, "atol": 2e-3 * float(expected.abs().max())} if backend == "cpu" else {"rtol": 1e-5, "atol": 1e-4}
    )
    torch.testing.assert_close(layer(x).double(), expected, **tolerance)


@pytest.mark.parametrize("count", [1, 30, 500])
@pytest.mark.parametrize("index", ["block", "bitmap"])
def test_salient_weights_come_back_from_either_index(count, index):
    """Codes replace the base exactly at the mask, whichever index stores the places."""
    weights = salient(6, 160, count)
    layer = sign_layer(weights)
    spec = LayerSpec.from_dict({**layer.spec.to_dict(), "salient": {"count": count, "index": index}})
    rebuilt = build_layer(spec)
    rebuilt.salient.fill(weights)
    rows, columns = rebuilt.salient.places()
    assert torch.equal(torch.stack([rows, columns], 1), weights.mask_OI.nonzero())
    expected = (weights.codes_OI[weights.mask_OI].float() - 128) * 0.5
    assert torch.equal(rebuilt.salient.values(rows), expected)


@pytest.mark.parametrize(("name", "value"), [("columns", 255), ("counts", 100)])
def test_a_salient_index_that_leaves_the_matrix_is_refused(name, value):
    """A column past the last, or more places than codes."""
    part = sign_layer(salient(6, 160, 30)).salient
    part.check()
    part.get_buffer(name)[-1] = value
    with pytest.raises(CorruptArtifact, match="6 x 160 matrix"):
        part.check()


def test_the_smaller_index_is_chosen():
    """Few salient weights are indexed one by one, many by a bitmap."""
    assert choose_index(10, 100, 256).index == "block"
    assert choose_index(10_000, 100, 256).index == "bitmap"


@pytest.mark.parametrize("make", [sign_layer, int_layer])
def test_a_layer_rebuilt_from_its_spec_takes_its_tensors(make):
    """The spec alone gives the names, shapes and dtypes on disk."""
    layer = make(salient(6, 160, 30))
    layer.set_bias(torch.zeros(6))
    rebuilt = build_layer(LayerSpec.from_dict(layer.spec.to_dict()))
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt.dequantize(), layer.dequantize())


def test_bits_are_counted_from_stored_bytes():
    """One sign plane with both scales on 32 x 64: 1 + 16/64 + 16/32 bits."""
    layer = SignLinear.from_parts(draw(1, 32, 64), scale_in_PI=torch.ones(1, 64), scale_out_PO=torch.ones(1, 32))
    assert layer.bits_per_weight() == 1 + 16 / 64 + 16 / 32
    assert layer.stored_bytes() == sum(tensor.nbytes for tensor in layer.state_dict().values())


def test_bits_of_grouped_integers():
    """3-bit codes with float16 scale and 3-bit zero per 32: 3 + 19/32 bits."""
    layer = GroupedIntLinear.from_codes(torch.zeros(32, 64).int(), torch.ones(32, 2), torch.zeros(32, 2).int(), 3)
    assert layer.bits_per_weight() == 3 + 19 / 32


@pytest.mark.parametrize(
    "values",
    [
        {"in_features": 0},
        {"groups": 3},
        {"shift_groups": 7},
        {"salient": {"count": 10**9, "index": "block"}},
        {"rank": 8},
        {"format": "factor"},
        {"format": "factor", "rank": 8, "salient": {"count": 1, "index": "block"}},
        {"format": "lut", "groups": 1},
        {"format": "lut", "planes": 2},
        {"planes": 9},
    ],
)
def test_an_impossible_spec_is_refused(values):
    """A spec from a file is checked before tensors are made from it."""
    good = {"format": "sign", "in_features": 64, "out_features": 8}
    with pytest.raises(ConfigError, match="LayerSpec"):
        LayerSpec.from_dict({**good, **values})


def test_moving_a_layer_drops_its_unpacked_weight():
    """A dtype change is seen by the dense backend."""
    layer = int_layer()
    x = draw(1, 160)
    layer(x)
    assert layer.to(torch.float32)(x.bfloat16()).dtype == torch.bfloat16
    assert isinstance(layer, nn.Module)


class Attention(nn.Module):
    """Three linears that read one input, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = int_layer(), int_layer(salient(6, 160, 30)), int_layer()
        self.v.set_bias(draw(6, seed=9))
        self.o = sign_layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x), self.o(x + 1)), -1)


@pytest.fixture
def attention() -> Attention:
    """On the packed CPU backend; skips where it cannot run."""
    try:
        resolve_backend("cpu")
    except BackendUnavailable as error:
        pytest.skip(str(error))
    module = Attention()
    use_backend(module, "cpu")
    return module


def test_linears_of_one_input_share_a_product(attention):
    """The same numbers, bit for bit, in one product in place of three; in any order of calls."""
    x = draw(5, 160)
    apart = attention(x)
    pack_layers(attention, [("q", "k", "v")])
    assert attention.q.packed_bytes() > 0
    assert (attention.k.packed_bytes(), attention.v.packed_bytes()) == (0, 0)
    assert torch.equal(attention(x), apart)
    other = draw(5, 160, seed=1)
    v, q_of_other, k, q = attention.v(x), attention.q(other), attention.k(x), attention.q(x)
    assert torch.equal(torch.cat((q, k, v), -1), apart[:, :18])
    assert torch.equal(q_of_other, attention.q(other))
    assert torch.equal(attention.q(x), attention.q(x))


def test_linears_of_different_structure_are_packed_apart(attention):
    """Codes and sign planes cannot be rows of one weight."""
    x = draw(5, 160)
    apart = attention(x)
    pack_layers(attention, [("q", "o")])
    assert attention.q.packed_bytes() > 0
    assert attention.o.packed_bytes() > 0
    assert torch.equal(attention(x), apart)


def test_a_model_with_shared_products_compiles_into_one_graph(attention):
    """The exchange between members is invisible to the compiler."""
    pack_layers(attention, [("q", "k", "v")])
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5):
        x = draw(tokens, 160)
        assert torch.equal(compiled(x), attention(x))


def test_stored_tensors_can_be_dropped_once_packed(attention):
    """The layer computes on; what would need them fails instead of giving noise."""
    x = draw(2, 160)
    expected = attention(x)
    pack_layers(attention, [("q", "k", "v")])
    held = packed_bytes(attention)
    release_stored(attention)
    assert all(buffer.is_meta for buffer in attention.buffers())
    assert torch.equal(attention(x), expected)
    assert packed_bytes(attention) == held > 0
    with pytest.raises(NotImplementedError):
        attention.to(torch.device("cpu"), torch.float64)


def test_a_layer_that_is_not_packed_keeps_its_tensors():
    """Dense and reference still need them."""
    layer = int_layer()
    release_stored(layer)
    assert not any(buffer.is_meta for buffer in layer.buffers())


def test_another_backend_starts_afresh(attention):
    """What was packed for one backend is never computed with under the name of another."""
    x = draw(2, 160)
    pack_layers(attention, [("q", "k", "v")])
    use_backend(attention, "reference")
    assert packed_bytes(attention) == 0
    torch.testing.assert_close(attention(x)[:, :6], x @ attention.q.dequantize().T, rtol=1e-5, atol=1e-4)
    use_backend(attention, "cpu")
    pack_layers(attention)
    release_stored(attention)
    use_backend(attention, "cpu")
    with pytest.raises(BackendUnavailable, match="load it again"):
        use_backend(attention, "dense")


@pytest.mark.parametrize("damage", ["swap", "repeat", "far"])
def test_a_salient_index_out_of_order_is_refused(damage):
    """Backends read the codes in row-major order: an index in another order would mean another weight to each."""
    layer = int_layer(salient(6, 160, 30))
    assert layer.spec.salient.index == "block"
    layer.salient.check()
    columns = layer.salient.columns
    row = int((layer.salient.counts[:, 0] >= 2).nonzero()[0])
    first = int(layer.salient.counts[:row].sum())
    if damage == "swap":
        columns[[first, first + 1]] = columns[[first + 1, first]]
    columns[first + 1] = {"swap": columns[first + 1], "repeat": columns[first], "far": 200}[damage]
    with pytest.raises(CorruptArtifact, match="out of order, twice, or outside"):
        layer.salient.check()

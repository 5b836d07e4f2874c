"""A split layer is its parts side by side: every backend agrees, bytes are counted, a wrong index is refused."""

import copy

import pytest
import torch
from torch import nn

from onebit_core.errors import BackendUnavailable, ConfigError, CorruptArtifact
from onebit_core.latents import LATENTS
from onebit_core.latents.student import scales_in_training
from onebit_core.layers import (
    FactorLinear,
    GroupedIntLinear,
    LayerSpec,
    LutLinear,
    QuantizedLinear,
    SalientWeights,
    SignLinear,
    SplitLinear,
    build_layer,
    pack_layers,
    packed_bytes,
    quantized_layers,
    release_stored,
    use_backend,
)
from tests.support.backends import CPU_BACKENDS

ROWS = 37


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sign_part(columns: int, seed: int = 0) -> SignLinear:
    return SignLinear.from_parts(
        draw(1, ROWS, columns, seed=seed),
        scale_in_PI=draw(1, columns, seed=seed + 1).abs(),
        scale_out_PO=draw(1, ROWS, seed=seed + 2).abs(),
    )


def residual_part(columns: int, groups: int) -> SignLinear:
    return SignLinear.from_parts(
        draw(2, ROWS, columns),
        group_scale_POG=draw(2, ROWS, groups, seed=1).abs(),
        shift_OG=draw(ROWS, groups, seed=2),
    )


def int_part(columns: int, groups: int = 1, bits: int = 4) -> GroupedIntLinear:
    codes = (draw(ROWS, columns, seed=3).abs() * 1000).int() % 2**bits
    zero = (draw(ROWS, groups, seed=4).abs() * 1000).int() % 2**bits
    return GroupedIntLinear.from_codes(codes, draw(ROWS, groups, seed=5).abs(), zero, bits)


def lut_part(columns: int, groups: int) -> LutLinear:
    index = (draw(ROWS, columns, seed=6).abs() * 1000).int() % 4
    return LutLinear.from_levels(index, draw(ROWS, groups, 4, seed=7).sort(-1).values)


def factor_part(columns: int) -> FactorLinear:
    return FactorLinear.from_factors(
        draw(40, columns),
        draw(ROWS, 40, seed=1),
        scale_in_I=draw(columns, seed=2),
        scale_mid_R=draw(40, seed=3),
        scale_out_O=draw(ROWS, seed=4),
    )


def salient_part(columns: int) -> GroupedIntLinear:
    mask = draw(ROWS, columns, seed=8) > 1.0
    weights = SalientWeights(
        mask_OI=mask,
        codes_OI=torch.arange(ROWS * columns).view(ROWS, columns) % 256,
        scale_O=torch.full((ROWS,), 0.1),
        zero_O=torch.full((ROWS,), 128),
    )
    codes = torch.arange(ROWS * columns).view(ROWS, columns) % 8
    return GroupedIntLinear.from_codes(codes, draw(ROWS, 1).abs(), torch.ones(ROWS, 1).int(), 3, weights)


PAIRS = {
    "4 bit and signs": (lambda: int_part(33), lambda: sign_part(100)),
    "one column and the rest": (lambda: int_part(1, bits=8), lambda: sign_part(258)),
    "residual signs and levels, in blocks": (lambda: residual_part(15, 5), lambda: lut_part(145, 5)),
    "signs with other input scales": (lambda: sign_part(64), lambda: sign_part(64, seed=9)),
    "factors and salient weights": (lambda: factor_part(50), lambda: salient_part(77)),
}


def split_layer(name: str = "4 bit and signs") -> SplitLinear:
    first, second = (make() for make in PAIRS[name])
    columns = first.in_features + second.in_features
    mask = torch.zeros(columns, dtype=torch.bool)
    mask[torch.randperm(columns, generator=torch.Generator().manual_seed(2))[: first.in_features]] = True
    return SplitLinear.from_layers(mask, (first, second))


def dense_by_hand(layer: SplitLinear) -> torch.Tensor:
    """Take the columns one by one, as the format's page says."""
    words = layer.bitmap.tolist()
    rests = [iter(part.dequantize().T) for part in layer.parts]
    columns = [next(rests[0 if words[i // 32] >> i % 32 & 1 else 1]) for i in range(layer.in_features)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", PAIRS)
def test_the_dense_weight_takes_its_columns_from_the_parts(name):
    """A set bit means the next column of the first part, a clear one the next of the second."""
    layer = split_layer(name)
    assert torch.equal(layer.dequantize(), dense_by_hand(layer))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_backend_multiplies_by_the_dense_weight(name, with_bias, backend):
    """Each gives x @ dequantize().T + bias, for tokens of any leading shape and for none."""
    layer = split_layer(name)
    bias = draw(ROWS, seed=9)
    if with_bias:
        layer.set_bias(bias)
    x = draw(2, 3, layer.in_features, seed=7)
    expected = x.double() @ layer.dequantize().double().T + (bias.double() if with_bias else 0)
    use_backend(layer, backend)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
    assert layer(x[:, :0]).shape == (2, 0, ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_parts_are_summed_before_they_are_rounded(backend, dtype):
    """Two parts that nearly cancel leave what float32 leaves; the result has x's dtype."""
    ones, others = torch.ones(1, ROWS, 64), torch.full((1, ROWS, 64), -1.0)
    scale = torch.ones(1, ROWS)
    near = scale * (1 + 2.0**-10)
    mask = torch.arange(128) % 2 == 0
    parts = (SignLinear.from_parts(ones, scale_out_PO=near), SignLinear.from_parts(others, scale_out_PO=scale))
    layer = SplitLinear.from_layers(mask, parts)
    use_backend(layer, backend)
    result = layer(torch.ones(1, 128, dtype=dtype))
    assert result.dtype == dtype
    if backend != "dense":  # which rounds the weight itself to x's dtype
        torch.testing.assert_close(result.float(), torch.full((1, ROWS), 64 * 2.0**-10), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_rebuilt_from_its_spec_takes_its_tensors(name):
    """Nested specs go through plain values; names, shapes and dtypes follow from them alone."""
    layer = split_layer(name)
    layer.set_bias(torch.zeros(ROWS))
    spec = LayerSpec.from_dict(layer.spec.to_dict())
    assert spec == layer.spec
    rebuilt = build_layer(spec)
    rebuilt.load_state_dict(layer.state_dict())
    rebuilt.check()
    assert torch.equal(rebuilt.dequantize(), layer.dequantize())


def test_bytes_count_the_parts_and_one_bit_a_column():
    """Each stored tensor counts where it would without the split, and the columns' index to the index."""
    layer = split_layer()
    by_part: dict[str, int] = {}
    for _, part, tensor in layer.stored_tensors():
        by_part[part] = by_part.get(part, 0) + tensor.nbytes
    int_zero, sign_scales = 4 * 4 * 2, 2 * (100 + ROWS)
    assert by_part == {
        "index": 4 * 5, "codes": 4 * 4 * 2 * ROWS, "signs": 4 * 4 * ROWS, "scales": 2 * ROWS + int_zero + sign_scales,
    }  # fmt: skip
    assert layer.bits_per_weight() == 8 * sum(by_part.values()) / (ROWS * 133)


PART = {"format": "sign", "in_features": 32, "out_features": 8}


@pytest.mark.parametrize(
    "values",
    [
        {"parts": []},
        {"parts": [PART]},
        {"parts": [PART, PART, {**PART, "in_features": 8}]},
        {"parts": [PART, {**PART, "in_features": 31}]},
        {"parts": [PART, {**PART, "out_features": 9}]},
        {"parts": [PART, {**PART, "bias": True}]},
        {"parts": [PART, {**PART, "in_features": 0}]},
        {"parts": [PART, {**PART, "format": "split", "parts": [{**PART, "in_features": 16}] * 2}]},
        {"parts": [PART, PART], "planes": 2},
        {"parts": [PART, PART], "scale_in": True},
        {"parts": [PART, PART], "salient": {"count": 1, "index": "block"}},
        {"format": "sign", "parts": [PART, PART]},
        {"parts": [PART, "sign"]},
        {"parts": PART},
    ],
)
def test_an_impossible_spec_is_refused(values):
    """Parts that do not make up the whole, or that a part cannot be."""
    with pytest.raises(ConfigError, match="LayerSpec"):
        LayerSpec.from_dict({"format": "split", "in_features": 64, "out_features": 8, **values})


@pytest.mark.parametrize("bit", [0, 40, 140])
def test_an_index_that_contradicts_its_parts_is_refused(bit):
    """A column too many or too few for the first part, or one past the last."""
    layer = split_layer()
    layer.check()
    layer.bitmap[bit // 32] ^= 1 << bit % 32
    with pytest.raises(CorruptArtifact, match=r"37 x 133 matrix names \d+ columns and [01] outside of it"):
        layer.check()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_damaged_index_gives_an_error_and_no_noise(backend):
    """Where nobody checked it, the parts still refuse inputs that are not theirs."""
    layer = split_layer()
    layer.bitmap[0] ^= 1 << 3
    use_backend(layer, backend)
    with pytest.raises((ValueError, RuntimeError)):
        layer(draw(1, 133))


class Attention(nn.Module):
    """Split layers beside one that is not; q, k and v read one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = split_layer(), split_layer(), sign_part(133)
        self.k.set_bias(draw(ROWS, seed=9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)


@pytest.fixture
def attention() -> Attention:
    """On the packed CPU backend; skips where it cannot run."""
    module = Attention()
    parameter = next(each for each in CPU_BACKENDS if each.values == ("cpu",))
    if parameter.marks:
        pytest.skip("the cpu backend cannot run here")
    use_backend(module, "cpu")
    return module


def test_parts_are_packed_once_each_and_shared_with_nobody(attention):
    """Packed bytes count every part once; a product over q, k and v is not made; results stay."""
    x = draw(5, 133)
    apart = attention(x)
    pack_layers(attention, [("q", "k", "v")])
    parts = [part for layer in (attention.q, attention.k) for part in layer.parts]
    each = [part.packed_bytes() for part in parts]
    assert all(size > 0 for size in each)
    columns, bias = 2 * 133 * 8, 4 * ROWS
    assert packed_bytes(attention) == sum(each) + columns + bias + attention.v.packed_bytes()
    assert torch.equal(attention(x), apart)


def test_stored_tensors_can_be_dropped_once_packed(attention):
    """Parts and index included; another backend is then refused."""
    x = draw(2, 133)
    expected = attention(x)
    release_stored(attention)
    assert all(buffer.is_meta for buffer in attention.buffers())
    assert torch.equal(attention(x), expected)
    with pytest.raises(BackendUnavailable, match="load it again"):
        use_backend(attention, "dense")


def test_another_backend_starts_afresh(attention):
    """Parts follow their layer."""
    x = draw(2, 133)
    pack_layers(attention)
    use_backend(attention, "reference")
    assert packed_bytes(attention) == 0
    torch.testing.assert_close(attention(x)[:, :ROWS], x @ attention.q.dequantize().T, rtol=1e-4, atol=1e-3)


def test_a_packed_model_compiles_into_one_graph(attention):
    """Gathering and summing are visible to the compiler, products are ops."""
    pack_layers(attention)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5):
        x = draw(tokens, 133)
        torch.testing.assert_close(compiled(x), attention(x))


def test_moving_a_layer_moves_its_columns():
    """What was found on the device of before is found again."""
    layer = split_layer()
    layer(draw(1, 133))
    copied = copy.deepcopy(layer).to(torch.device("cpu"))
    assert copied._columns is None
    assert torch.equal(copied.dequantize(), layer.dequantize())


def test_parts_are_no_layers_of_a_model():
    """Whoever walks over a model's layers meets a split one once."""
    found = dict(quantized_layers(Attention()))
    assert list(found) == ["q", "k", "v"]
    assert sum(isinstance(module, QuantizedLinear) for module in Attention().modules()) == 7


@pytest.mark.parametrize("name", [name for name in PAIRS if "factors" not in name])
def test_an_untrained_latent_is_its_layer(name):
    """It multiplies by the same weight, has the parameters of both parts, and packs to the same bits."""
    layer = split_layer(name)
    layer.set_bias(draw(ROWS, seed=1))
    before = copy.deepcopy(layer.state_dict())
    weight = layer.dequantize() + draw(ROWS, layer.in_features, seed=3) / 100
    latent = LATENTS["split"](layer, weight)
    x = draw(5, layer.in_features, seed=2)
    torch.testing.assert_close(latent(x), layer(x), rtol=1e-4, atol=1e-3)
    latent(x).square().sum().backward()
    trained = {id(value) for value in latent.parameters() if value.grad is not None}
    assert trained == {id(value) for value in latent.latents() + latent.factors()}
    assert len(latent.latents()) == 2
    hardened = latent.harden().state_dict()
    assert all(torch.equal(hardened[key], value) for key, value in before.items())


def test_training_the_scales_reaches_the_parts():
    """What distillation changes is packed into both parts, and a layer is in its place again."""
    blocks = nn.ModuleList([Attention()])
    layer = blocks[0].q
    before = [part.dequantize() for part in layer.parts]
    with scales_in_training(blocks) as latents, torch.no_grad():
        assert len(latents) == 3
        for value in latents["0.q"].factors():
            value += 0.25
    assert blocks[0].q is layer
    for part, old in zip(layer.parts, before, strict=True):
        assert not torch.equal(part.dequantize(), old)

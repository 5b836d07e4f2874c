"""The even index of salient weights: as many in every row and block, so nothing but their columns is stored."""

import pytest
import torch

from onebit_core.errors import ConfigError, CorruptArtifact
from onebit_core.layers import LayerSpec, SalientWeights, SignLinear, build_layer, use_backend
from onebit_core.layers.salient import choose_index
from tests.support.backends import CPU_BACKENDS

ROWS, COLUMNS, BLOCKS, EACH = 6, 144, 2, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def even_layer() -> SignLinear:
    places = draw(ROWS, BLOCKS, COLUMNS // BLOCKS).argsort(-1)[..., :EACH]
    mask = torch.zeros(ROWS, BLOCKS, COLUMNS // BLOCKS, dtype=torch.bool).scatter_(2, places, value=True)
    weights = SalientWeights(
        mask_OI=mask.flatten(1),
        codes_OI=torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 256,
        scale_O=torch.full((ROWS,), 0.5),
        zero_O=torch.full((ROWS,), 128),
        even_blocks=BLOCKS,
    )
    return SignLinear.from_parts(draw(1, ROWS, COLUMNS), scale_out_PO=torch.ones(1, ROWS), salient=weights)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_salient_weights_come_back(backend):
    """The places follow from the columns alone; every backend multiplies by the dense weight."""
    layer = even_layer()
    assert layer.spec.salient.index == "even"
    layer.salient.check()
    codes = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 256
    rows, columns = layer.salient.places()
    assert torch.equal(layer.salient.values(rows), (codes[rows, columns].float() - 128) * 0.5)
    rebuilt = build_layer(LayerSpec.from_dict(layer.spec.to_dict()))
    rebuilt.load_state_dict(layer.state_dict())
    assert torch.equal(rebuilt.dequantize(), layer.dequantize())
    use_backend(layer, backend)
    x = draw(3, COLUMNS, seed=1)
    expected = x @ rebuilt.dequantize().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


def test_only_codes_and_columns_grow_with_the_count():
    """A byte each; scale and zero per row."""
    sizes = {name: tensor.nbytes for name, tensor in even_layer().salient.named_buffers()}
    count = ROWS * BLOCKS * EACH
    assert sizes == {"codes": count, "columns": count, "scale": 2 * ROWS, "zero": ROWS}


def test_a_bitmap_is_taken_where_it_is_smaller():
    """From one weight in eight on."""
    assert choose_index(100 * 2 * 15, 100, 256, even_blocks=2).index == "even"
    assert choose_index(100 * 2 * 16, 100, 256, even_blocks=2).index == "bitmap"


@pytest.mark.parametrize(
    "salient",
    [
        {"index": "even", "count": 36},
        {"index": "even", "count": 36, "blocks": 5},
        {"index": "even", "count": 36, "blocks": 1},
        {"index": "even", "count": 37, "blocks": 2},
        {"index": "even", "count": 0, "blocks": 2},
        {"index": "block", "count": 36, "blocks": 2},
    ],
)
def test_an_impossible_spec_is_refused(salient):
    """Blocks that are missing, unequal, too wide or unequally filled."""
    with pytest.raises(ConfigError, match=r"SalientSpec|LayerSpec"):
        LayerSpec.from_dict({"format": "sign", "in_features": COLUMNS, "out_features": ROWS, "salient": salient})


@pytest.mark.parametrize(("place", "value"), [(0, 72), (0, 255), (1, 0)])
def test_columns_out_of_order_or_outside_of_their_block_are_refused(place, value):
    """A block of 72 columns, counted from 0; each column once, ascending."""
    layer = even_layer()
    layer.salient.columns[:3] = torch.tensor([5, 6, 7], dtype=torch.uint8)
    layer.salient.check()
    layer.salient.columns[place] = value
    with pytest.raises(CorruptArtifact, match="out of order, twice, or outside"):
        layer.salient.check()

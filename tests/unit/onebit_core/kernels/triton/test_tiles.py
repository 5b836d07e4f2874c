"""Tiles: shipped rules fit every shape, measured ones win, damaged tables do no harm."""

import json

import pytest

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from onebit_core.errors import ConfigError
from onebit_core.kernels.triton import tiles
from onebit_core.kernels.triton.prepack import num_blocks
from onebit_core.kernels.triton.tiles import Gpu, Product, Tile

HOPPER = Gpu("NVIDIA H100 80GB HBM3", 90, 132)
SHAPES = st.integers(1, 200_000)


@settings(max_examples=200, deadline=None)
@given(
    architecture=st.sampled_from([80, 86, 87, 89, 90, 100, 103, 120, 121]),
    rows=SHAPES,
    columns=SHAPES,
    tokens=st.integers(1, 5000),
    planes=st.integers(1, 9),
    grouped=st.booleans(),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    kind=st.sampled_from(["planes", "bytes", "int8"]),
)
def test_every_shape_has_a_tile(architecture, rows, columns, tokens, planes, grouped, dtype, kind):
    """No split is left without columns, and no tile is cut along K unless its counter exists."""
    product = Product(kind, rows, columns, planes, 128 if grouped else 0, dtype)
    tile = tiles.tile_by_rule(Gpu("any", architecture, 100), product, tiles.bucket_of(tokens))
    blocks = num_blocks(columns)
    assert tile.rows % (16 * tile.warps) == 0
    assert 1 <= tile.splits <= max(1, blocks // tiles.MIN_SPLIT_BLOCKS)
    assert (tile.splits - 1) * tiles.blocks_per_split(blocks, tile.splits, tile.columns // 128) < blocks


def test_few_rows_and_tokens_are_split_until_the_device_is_full():
    small = tiles.tile_by_rule(HOPPER, Product("planes", 4096, 4096, 1, 0, "bf16"), 1)
    large = tiles.tile_by_rule(HOPPER, Product("planes", 28672, 8192, 1, 0, "bf16"), 1)
    assert small.splits >= 4
    assert large.splits == 1


def test_hopper_wants_wider_tiles_from_an_old_triton():
    old = Gpu("H100", 90, 132, fewest_tokens=16)
    assert tiles.tile_by_rule(old, Product("planes", 4096, 4096, 1, 0, "bf16"), 1).tokens == 16


def test_the_dense_path_begins_earlier_with_more_products():
    def begins(planes, has_sparse=False):
        return tiles.dense_from(HOPPER, Product("planes", 1, 1, planes, 0, "bf16"), has_sparse=has_sparse)

    assert [begins(planes) for planes in (1, 2, 5)] == [512, 128, 39]
    assert begins(1, has_sparse=True) == 32


def test_a_measured_tile_wins(tmp_path, monkeypatch):
    product = Product("planes", 4096, 4096, 1, 0, "bf16")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tiles.user_table_file(HOPPER)
    assert file.parent == tmp_path / ".cache" / "onebit" / "tiles"
    assert file.name.startswith("nvidia-h100-80gb-hbm3-")
    try:
        tiles.write_user_table(file, HOPPER, {product.key(8): [32, 8, 128, 2, 5, 3]})
        tiles.write_user_table(file, HOPPER, {"dense_from," + product.key(0): [77]})
        assert tiles.choose_tile(HOPPER, product, 7) == Tile(32, 8, 128, 2, 5, 3)
        assert tiles.choose_tile(HOPPER, product, 9).rows == 64
        assert tiles.dense_from(HOPPER, product, has_sparse=False) == 77
    finally:
        tiles.user_table.cache_clear()
        tiles._tile_of_bucket.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 9}', '{"format": 1}', '{"format": 1, "entries": {"x": [1, 2, 3, 4, 5, 6]}}']
)
def test_a_damaged_table_is_no_table(tmp_path, monkeypatch, text):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tiles.user_table_file(HOPPER)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    try:
        tiles.user_table.cache_clear()
        assert tiles.user_table(HOPPER) == {}
        tiles.write_user_table(file, HOPPER, {"k": [64, 8, 128, 4, 4, 1]})
        assert json.loads(file.read_text())["entries"] == {"k": [64, 8, 128, 4, 4, 1]}
    finally:
        tiles.user_table.cache_clear()


@pytest.mark.parametrize(
    "fields", [(24, 8, 128, 1, 3), (64, 4, 128, 4, 3), (64, 8, 100, 4, 3), (64, 8, 128, 3, 3), (64, 8, 128, 4, 3, 99)]
)
def test_impossible_tiles_are_refused(fields):
    with pytest.raises(ConfigError, match="no kernel can be cut"):
        Tile(*fields)

"""The cache gives back what was written: exactly, or closely in 8 bit, and never a neighbour's NaN."""

import pytest
import torch

from service.engine.kv_cache import KV_CACHES

SHAPE = {"num_layers": 2, "num_pages": 6, "page_size": 4, "num_kv_heads": 3}
TOKENS = 7
PAGES = torch.tensor([5, 2])
SLOTS = torch.tensor([20, 21, 22, 23, 8, 9, 10])  # pages 5 and 2, in order of position

both = pytest.mark.parametrize("kind", KV_CACHES)


def make_cache(kind, head_dim=16, dtype=torch.float32):
    return KV_CACHES[kind](**SHAPE, head_dim=head_dim, dtype=dtype, device=torch.device("cpu"))


def drawn(head_dim=16, seed=0):
    """Return keys and values [T, K, D] in which two dimensions are far larger than the others, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, TOKENS, SHAPE["num_kv_heads"], head_dim, generator=generator)
    keys[..., :2] *= 20
    return keys, values


def attended(cache, layer, query_TKD):
    """Attend the last query over all tokens, through the cache."""
    keys, values = (rows.flatten(0, 1)[:TOKENS] for rows in cache.read(layer, PAGES))
    scores_KS = torch.einsum("kd,skd->ks", cache.align(query_TKD)[0], keys) / query_TKD.shape[-1] ** 0.5
    return cache.restore(torch.einsum("ks,skd->kd", scores_KS.softmax(-1), values)[None])[0]


def test_the_models_dtype_is_exact():
    """Without quantization every number comes back as it is, in its layer and at its place."""
    cache, (keys, values) = make_cache("auto"), drawn()
    cache.write(1, SLOTS, keys, values)
    read_keys, read_values = cache.read(1, PAGES)
    assert torch.equal(read_keys.flatten(0, 1)[:TOKENS], keys)
    assert torch.equal(read_values.flatten(0, 1)[:TOKENS], values)
    assert not any(rows.any() for rows in cache.read(0, PAGES))


@pytest.mark.parametrize("head_dim", [16, 24, 5], ids="head size {}".format)
@both
def test_attention_over_the_cache_is_attention_over_what_was_written(kind, head_dim):
    """Scores and sums need no rotating back, whatever the head size."""
    cache, (keys, values) = make_cache(kind, head_dim), drawn(head_dim)
    query = torch.randn(1, SHAPE["num_kv_heads"], head_dim, generator=torch.Generator().manual_seed(9)) / 20
    cache.write(0, SLOTS, keys, values)
    scores_KS = torch.einsum("kd,skd->ks", query[0], keys) / head_dim**0.5
    expected = torch.einsum("ks,skd->kd", scores_KS.softmax(-1), values)
    assert torch.allclose(attended(cache, 0, query), expected, atol=1e-6 if kind == "auto" else 0.05)


def test_no_row_is_further_off_than_half_a_step():
    """In 8 bit each of a row's rotated numbers is rounded to one of 255 levels of its own scale."""
    cache, (keys, values) = make_cache("int8"), drawn()
    cache.write(0, SLOTS, keys, values)
    for rows, read in zip((keys, values), cache.read(0, PAGES), strict=True):
        rotated = cache.align(rows)
        error = (read.flatten(0, 1)[:TOKENS] - rotated).abs().amax(-1)
        assert (error <= rotated.abs().amax(-1) / 127 * 0.501).all()


def test_rotation_keeps_small_dimensions_beside_large_ones():
    """Where two dimensions are twenty times the others, the error is below half of what it is without rotation."""
    cache, (keys, values) = make_cache("int8", head_dim=64), drawn(64)
    cache.write(0, SLOTS, keys, values)
    error = (cache.read(0, PAGES)[0].flatten(0, 1)[:TOKENS] - cache.align(keys)).norm()
    scale = keys.abs().amax(-1, keepdim=True) / 127
    assert error < 0.5 * ((keys / scale).round() * scale - keys).norm()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@both
def test_what_is_not_finite_stays_in_its_row_and_leaves_with_its_page(kind, poison):
    """A poisoned token reads as not finite, its neighbours as themselves, and a cleared page as zero."""
    cache, (keys, values) = make_cache(kind), drawn()
    keys[2, 1, 3] = poison
    cache.write(0, SLOTS, keys, values)
    is_finite = cache.read(0, PAGES)[0].flatten(0, 1)[:TOKENS].isfinite().all(-1)
    assert (~is_finite).nonzero().tolist() == [[2, 1]]
    cache.clear(PAGES[:1])
    assert not any(rows[0].any() for rows in cache.read(0, PAGES))
    assert all(rows[1].any() for rows in cache.read(0, PAGES))


@both
def test_what_was_never_written_reads_as_zero(kind):
    """Padding points at the null page; a row of zeros stays one."""
    cache = make_cache(kind)
    cache.write(0, SLOTS, torch.zeros(TOKENS, 3, 16), torch.zeros(TOKENS, 3, 16))
    assert not any(rows.any() for rows in cache.read(0, torch.tensor([[0, 5], [2, 1]])))
    assert cache.read(0, torch.tensor([[0, 5], [2, 1]]))[0].shape == (2, 2, 4, 3, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both
def test_a_page_takes_the_bytes_it_is_said_to_take(kind, dtype):
    """Capacity is planned with page_bytes; the cache has one page more than the pool, the null page."""
    cache = make_cache(kind, dtype=dtype)
    sizes = {name: SHAPE[name] for name in ("num_layers", "page_size", "num_kv_heads")}
    assert cache.num_bytes == (SHAPE["num_pages"] + 1) * cache.page_bytes(**sizes, head_dim=16, dtype=dtype)
    assert cache.read(0, PAGES)[0].dtype == dtype

"""The decoder blocks in C: the numbers of a plain torch model, in any cut of the same tokens the same bits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from onebit_core.errors import KernelError
from onebit_core.kernels.cpu import pack, why_unavailable
from onebit_core.kernels.cpu.decoder import PAGE_TOKENS, CpuDecoder, DecoderBlock, DecoderShape
from onebit_core.kernels.operands import sign_terms
from onebit_core.kernels.packing import pack_signs
from onebit_core.kernels.planes import LinearOperands, dense_weight

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no CPU kernels: {why_unavailable()}")

LENGTHS = (37, 5, 70)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(rows, columns, seed):
    """Return a one-bit weight as the kernels take it, scaled so that a block neither grows nor dies."""
    signs = pack_signs(torch.where(draw(1, rows, columns, seed=seed) < 0, -1.0, 1.0))
    terms = sign_terms(
        signs,
        scale_in_PI=draw(1, columns, seed=seed + 1).abs(),
        scale_out_PO=draw(1, rows, seed=seed + 2).abs() / columns**0.5,
        group_scale_POG=None,
        shift_OG=None,
    )
    return LinearOperands(out_features=rows, in_features=columns, planes=terms, sparse=None)


class Model:
    """Two blocks of random one-bit weights: as a CpuDecoder, and as torch computes them in float64."""

    def __init__(self, *, heads=6, key_heads=2, head_dim=32, hidden=80, inner=112, head_norms=False, window=None):
        self.shape = DecoderShape(
            hidden=hidden, heads=heads, key_heads=key_heads, head_dim=head_dim, inner=inner, eps=1e-5, scaling=0.2
        )
        width, key_width = heads * head_dim, key_heads * head_dim
        sizes = {"q": (width, hidden), "k": (key_width, hidden), "v": (key_width, hidden), "o": (hidden, width)}
        sizes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        self.weights = [
            {name: product(*size, seed=100 * layer + 10 * place) for place, (name, size) in enumerate(sizes.items())}
            for layer in range(2)
        ]
        self.norms = [draw(4, max(hidden, head_dim), seed=7 + layer).abs() + 0.5 for layer in range(2)]
        self.final = draw(hidden, seed=3).abs()
        self.head_norms, self.window = head_norms, window
        self.decoder = CpuDecoder(self.shape, [self._block(layer) for layer in range(2)], self.final)
        self.key_width = key_width

    def _norm(self, layer, place):
        size = self.shape.hidden if place < 2 else self.shape.head_dim
        return self.norms[layer][place, :size]

    def _block(self, layer):
        chain = {name: (pack(weight),) for name, weight in self.weights[layer].items()}
        q_norm, k_norm = (self._norm(layer, place) if self.head_norms else None for place in (2, 3))
        return DecoderBlock(
            input_norm_D=self._norm(layer, 0),
            post_norm_D=self._norm(layer, 1),
            q_norm_R=q_norm,
            k_norm_R=k_norm,
            window=self.window if layer else None,
            qkv=(chain["q"], chain["k"], chain["v"]),
            o=chain["o"],
            gate_up=(chain["gate"], chain["up"]),
            down=chain["down"],
        )

    def expected(self, hidden_TD, cos_TR, sin_TR):
        """Return what one sequence becomes, computed whole in float64."""
        shape, x = self.shape, hidden_TD.double()
        cos, sin = cos_TR.double()[:, None], sin_TR.double()[:, None]

        def norm(x, weight):
            return x / (x.square().mean(-1, keepdim=True) + shape.eps).sqrt() * weight.double()

        def rotated(x):
            low, high = x.chunk(2, -1)
            return x * cos + torch.cat((-high, low), -1) * sin

        for layer, weights in enumerate(self.weights):
            dense = {name: dense_weight(weight).double() for name, weight in weights.items()}
            normed = norm(x, self._norm(layer, 0))
            q, k, v = ((normed @ dense[name].T).unflatten(-1, (-1, shape.head_dim)) for name in "qkv")
            if self.head_norms:
                q, k = norm(q, self._norm(layer, 2)), norm(k, self._norm(layer, 3))
            q, k, v = (y.transpose(0, 1) for y in (rotated(q), rotated(k), v))
            visible = torch.ones(len(x), len(x), dtype=torch.bool).tril()
            if layer and self.window:
                visible = visible.triu(1 - self.window)
            attended = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=visible, scale=shape.scaling, enable_gqa=True
            )[0]
            x = x + attended.transpose(0, 1).flatten(1) @ dense["o"].T
            normed = norm(x, self._norm(layer, 1))
            x = x + (F.silu(normed @ dense["gate"].T) * (normed @ dense["up"].T)) @ dense["down"].T
        return norm(x, self.final)


class Cache:
    """Pages of two layers; tables of the sequences, their pages scattered over the pool."""

    def __init__(self, model, lengths):
        counts = [-(-length // PAGE_TOKENS) for length in lengths]
        order = np.random.default_rng(0).permutation(sum(counts)) + 1
        self.tables = np.split(order, np.cumsum(counts)[:-1])
        shape = (2, sum(counts) + 1, PAGE_TOKENS, model.key_width)
        self.memory = (torch.full(shape, 5.0), torch.full(shape, 5.0))

    def run(self, model, inputs, chunks):
        """Compute chunks (sequence, start, count) as one step; return the hidden states of all their rows."""
        rows = [inputs[sequence][start : start + count] for sequence, start, count in chunks]
        angles = [rotation(start + count)[:, start:] for _, start, count in chunks]
        positions = [(self.tables[sequence], np.arange(start, start + count)) for sequence, start, count in chunks]
        slots = [table[at // PAGE_TOKENS] * PAGE_TOKENS + at % PAGE_TOKENS for table, at in positions]
        counts = [count for _, _, count in chunks]
        tables = [self.tables[sequence] for sequence, _, _ in chunks]
        firsts, places = (np.cumsum([0, *sizes[:-1]]) for sizes in (counts, [len(table) for table in tables]))
        cos_TR, sin_TR = torch.cat(angles, 1)
        return model.decoder.step(
            torch.cat(rows).clone(),
            (cos_TR, sin_TR),
            self.memory,
            slots_T=np.concatenate(slots),
            runs_N4=np.array([firsts, counts, [start for _, start, _ in chunks], places]).T,
            pages_P=np.concatenate(tables),
            rows=np.arange(sum(counts)),
        )


def rotation(length, head_dim=32):
    angle_TR = torch.arange(length)[:, None] * 10.0 ** -torch.linspace(0, 3, head_dim // 2).repeat(2)
    return torch.stack((angle_TR.cos(), angle_TR.sin()))


@pytest.fixture(params=[{}, {"head_norms": True}, {"window": 19}], ids=["plain", "norms", "window"], scope="module")
def model(request):
    return Model(**request.param)


@pytest.fixture(scope="module")
def inputs():
    return [draw(length, 80, seed=50 + length) for length in LENGTHS]


def test_blocks_compute_what_torch_computes(model, inputs):
    """Three prompts in one step, pages scattered; within the error of 14-bit activations."""
    found = Cache(model, LENGTHS).run(model, inputs, [(index, 0, length) for index, length in enumerate(LENGTHS)])
    for x, rows in zip(inputs, found.split(LENGTHS), strict=True):
        expected = model.expected(x, *rotation(len(x)))
        assert (rows - expected).norm() / expected.norm() < 2e-3


def test_any_cut_of_the_tokens_gives_the_same_bits(model, inputs):
    """Whole prompts alone; all together; in chunks beside each other; and token by token."""
    alone = [Cache(model, LENGTHS).run(model, inputs, [(i, 0, length)]) for i, length in enumerate(LENGTHS)]
    cache = Cache(model, LENGTHS)
    steps = [[(0, 0, 20), (2, 0, 33)], [(1, 0, 5), (2, 33, 1), (0, 20, 1)], [(2, 34, 36), (0, 21, 16)]]
    found = {index: torch.empty_like(rows) for index, rows in enumerate(alone)}
    for chunks in steps:
        rows = cache.run(model, inputs, chunks).split([count for _, _, count in chunks])
        for (sequence, start, count), part in zip(chunks, rows, strict=True):
            found[sequence][start : start + count] = part
    single = Cache(model, LENGTHS)
    tokens = torch.cat([single.run(model, inputs, [(0, position, 1)]) for position in range(LENGTHS[0])])
    for index, expected in enumerate(alone):
        assert torch.equal(found[index], expected)
    assert torch.equal(tokens, alone[0])


def test_threads_change_no_bit(model, inputs):
    """Split over threads where the work is worth it."""
    chunks = [(index, 0, length) for index, length in enumerate(LENGTHS)]
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(Cache(model, LENGTHS).run(model, inputs, chunks))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_nan_stays_in_its_sequence(model, inputs):
    """And no sequence reads what an earlier owner has left in its pages."""
    chunks = [(index, 0, length) for index, length in enumerate(LENGTHS)]
    clean = Cache(model, LENGTHS).run(model, inputs, chunks).split(LENGTHS)
    spoiled = [inputs[0], inputs[1].clone(), inputs[2]]
    spoiled[1][3, 0] = torch.nan
    found = Cache(model, LENGTHS).run(model, spoiled, chunks).split(LENGTHS)
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2], clean[2])
    assert found[1][3:].isnan().all()


def test_products_that_do_not_fit_are_refused(model):
    """Before anything is computed."""
    block = model._block(0)
    wrong = DecoderBlock(**{**vars(block), "down": block.o})
    with pytest.raises(KernelError, match="do not multiply 112 columns to 80 rows"):
        CpuDecoder(model.shape, [wrong], model.final)
    odd = DecoderShape(**{**vars(model.shape), "heads": 5})
    with pytest.raises(KernelError, match="rows"):
        CpuDecoder(odd, [block], model.final)


@pytest.mark.parametrize("head_dim", [8, 40, 528])
def test_head_sizes_that_the_kernels_do_not_have_are_refused(model, head_dim):
    """When the blocks are made, so that a caller can still compute them otherwise."""
    shape = DecoderShape(**{**vars(model.shape), "head_dim": head_dim})
    with pytest.raises(KernelError, match=f"head size {head_dim} is not a multiple of 16 up to 512"):
        CpuDecoder(shape, [], model.final)

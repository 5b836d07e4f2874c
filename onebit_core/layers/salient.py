"""SalientPart: the weights a layer keeps in 8 bit, and where they stand.

A salient weight REPLACES the base weight at its place: w = scale_row * (code - zero_row). Codes lie row by row, columns
ascending. Three indices exist, and a writer takes the smallest that fits:

    block     columns  uint8 [N]             column inside its block of 128
              counts   uint8 [O, ceil(I/128)]  salient weights per row and block (128 at most)
    even      columns  uint8 [N]             column inside its block; as many in every row and every equal block
    bitmap    bitmap   int32 [O, ceil(I/32)]   bit set where a weight is salient

All give the same row-major order, so the codes do not depend on the choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onebit_core.errors import CorruptArtifact
from onebit_core.kernels import SparseTerm, num_words, pack_bits, unpack_bits
from onebit_core.layers.spec import SALIENT_BLOCK, LayerSpec, SalientSpec


@dataclass(frozen=True, kw_only=True)
class SalientWeights:
    """The 8-bit weights of a matrix, before packing.

    Attributes:
        mask_OI: bool, set where a weight is salient; at least once.
        codes_OI: integer 0..255, read at the mask only.
        scale_O: floating, step per row; stored as float16.
        zero_O: integer 0..255, the code of zero per row.
        even_blocks: into how many equal blocks a row is cut that all hold as many salient weights; 0 if they do not.
    """

    mask_OI: Tensor
    codes_OI: Tensor
    scale_O: Tensor
    zero_O: Tensor
    even_blocks: int = 0

    def spec(self) -> SalientSpec:
        """Return the spec that stores these weights in the fewest bytes."""
        rows, columns = self.mask_OI.shape
        return choose_index(int(self.mask_OI.sum()), rows, columns, self.even_blocks)


def choose_index(count: int, out_features: int, in_features: int, even_blocks: int = 0) -> SalientSpec:
    """Return the spec with the smallest index, in bytes."""
    block_bytes = count + (0 if even_blocks else out_features * -(-in_features // SALIENT_BLOCK))
    bitmap_bytes = out_features * num_words(in_features) * 4
    if block_bytes >= bitmap_bytes:
        return SalientSpec(count=count, index="bitmap")
    return SalientSpec(count=count, index="even" if even_blocks else "block", blocks=even_blocks)


class SalientPart(nn.Module):
    """8-bit weights at given places of a matrix.

    Tensors: codes uint8 [N]; scale float16 [O]; zero uint8 [O]; and the index, see the module docstring.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        assert spec.salient is not None
        self.spec = spec.salient
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.register_buffer("codes", torch.empty(self.spec.count, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(self.out_features, dtype=torch.float16))
        self.register_buffer("zero", torch.empty(self.out_features, dtype=torch.uint8))
        if self.spec.index == "bitmap":
            words = num_words(self.in_features)
            self.register_buffer("bitmap", torch.empty(self.out_features, words, dtype=torch.int32))
            return
        self.register_buffer("columns", torch.empty(self.spec.count, dtype=torch.uint8))
        if self.spec.index == "block":
            blocks = -(-self.in_features // SALIENT_BLOCK)
            self.register_buffer("counts", torch.empty(self.out_features, blocks, dtype=torch.uint8))

    @property
    def _block_width(self) -> int:
        """Columns of a block of the index."""
        return self.in_features // self.spec.blocks if self.spec.index == "even" else SALIENT_BLOCK

    @torch.no_grad()
    def fill(self, weights: SalientWeights) -> None:
        """Store the weights; their mask has exactly `spec.count` entries set."""
        mask_OI = weights.mask_OI
        self.codes.copy_(weights.codes_OI[mask_OI])
        self.scale.copy_(weights.scale_O)
        self.zero.copy_(weights.zero_O)
        if self.spec.index == "bitmap":
            self.get_buffer("bitmap").copy_(pack_bits(mask_OI))
            return
        self.get_buffer("columns").copy_(mask_OI.nonzero()[:, 1] % self._block_width)
        if self.spec.index == "even":
            return
        padding = self.get_buffer("counts").shape[1] * SALIENT_BLOCK - self.in_features
        blocks = nn.functional.pad(mask_OI, (0, padding)).unflatten(1, (-1, SALIENT_BLOCK))
        self.get_buffer("counts").copy_(blocks.sum(-1))

    def places(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the salient weights, int64 [N] each, row-major."""
        if self.spec.index == "bitmap":
            rows, columns = unpack_bits(self.get_buffer("bitmap"), self.in_features).nonzero(as_tuple=True)
            return rows, columns
        counts = self._counts()
        blocks_of_N = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts.flatten())
        rows, blocks = blocks_of_N // counts.shape[1], blocks_of_N % counts.shape[1]
        return rows, blocks * self._block_width + self.get_buffer("columns").long()

    def _counts(self) -> Tensor:
        """Return how many salient weights a row has in each block, int64 [O, blocks]."""
        if self.spec.index == "block":
            return self.get_buffer("counts").long()
        each = self.spec.count // (self.out_features * self.spec.blocks)
        return torch.full((self.out_features, self.spec.blocks), each, device=self.codes.device)

    def check(self) -> None:
        """Refuse an index from a file that points outside of the matrix or out of order: kernels trust it.

        Raises:
            CorruptArtifact: it names another number of places than there are codes, a column past the last, or places
                that are not in row-major order, each once.
        """
        if self.spec.index == "bitmap":  # in order and inside of the matrix by its nature
            count = int(unpack_bits(self.get_buffer("bitmap"), self.in_features).sum())
            past_the_last = False
        else:
            counts_OB = self._counts()
            count = int(counts_OB.sum())
            past_the_last = count == self.spec.count and self._leads_outside(counts_OB)
        if count != self.spec.count or past_the_last:
            raise CorruptArtifact(
                f"the salient index names {count} places of a {self.out_features} x {self.in_features} matrix for "
                f"{self.spec.count} codes, or columns outside of it"
            )

    def _leads_outside(self, counts_OB: Tensor) -> bool:
        """Whether an index of as many places as there are codes names a column past the last.

        Places in row-major order, each once, are blocks in order and in each of them columns that grow; so one number
        for block and column together grows from each place to the next, without rows and columns being written out.

        Raises:
            CorruptArtifact: they are not in that order.
        """
        columns_N, width = self.get_buffer("columns"), self._block_width
        blocks_N = torch.arange(counts_OB.numel(), dtype=torch.int32, device=columns_N.device)
        blocks_N = blocks_N.repeat_interleave(counts_OB.flatten(), output_size=self.spec.count)
        order_N = blocks_N * width + columns_N
        if int(columns_N.max()) >= width or not bool((order_N[1:] > order_N[:-1]).all()):
            raise CorruptArtifact(
                f"the salient index of a {self.out_features} x {self.in_features} matrix names places out of "
                "order, twice, or outside of their block"
            )
        num_blocks = counts_OB.shape[1]
        in_last_block = self.in_features - (num_blocks - 1) * width
        if in_last_block >= width:
            return False
        return bool((columns_N[blocks_N % num_blocks == num_blocks - 1] >= in_last_block).any())

    def values(self, rows: Tensor) -> Tensor:
        """Return the weights, float32 [N], for the rows that `places` gave."""
        return self.scale.float()[rows] * (self.codes.float() - self.zero.float()[rows])

    def term(self) -> SparseTerm:
        """Return these weights in the form that packed kernels read."""
        if self.spec.index == "bitmap":
            bitmap_OW = self.get_buffer("bitmap")
        else:
            mask_OI = torch.zeros(self.out_features, self.in_features, dtype=torch.bool, device=self.codes.device)
            mask_OI[self.places()] = True
            bitmap_OW = pack_bits(mask_OI)
        return SparseTerm(bitmap_OW=bitmap_OW, codes_N=self.codes, scale_O=self.scale.float(), zero_O=self.zero)

"""Bits to 32-bit words and back; the layout here is the format on disk.

One row of a matrix becomes ceil(I / 32) words. Column i is bit (i % 32) of word i // 32, least significant first.
For signs a set bit means NEGATIVE (like the IEEE sign bit), and the sign of an exact zero is +1:

    column      0    1    2   ...  31 | 32 ...
    weight    -.3  +.2  -.1   ...     |
    bit         1    0    1   ...     |            word 0 = 0b...101

Unused bits of the last word are 0. Integer codes of b bits are stored as b such planes, plane p holding bit p of every
code, so a code costs exactly b bits and every format shares this one primitive.

Words are int32 because safetensors and torch's bit operators support it on every device.

Shape suffixes: P = planes, O = output features, I = input features, W = words of a row = ceil(I / 32).
"""

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(num_columns: int) -> int:
    """Return how many 32-bit words hold one row."""
    return -(-num_columns // WORD_BITS)


def pack_bits(bits_OI: Tensor) -> Tensor:
    """Pack a boolean matrix.

    Args:
        bits_OI: bool, any leading shape, last dimension I.

    Returns:
        int32, same leading shape, last dimension ceil(I / 32).
    """
    columns = bits_OI.shape[-1]
    padded = torch.nn.functional.pad(bits_OI, (0, num_words(columns) * WORD_BITS - columns))
    lanes = padded.unflatten(-1, (-1, 8)).to(torch.uint8) << _byte_shifts(bits_OI)
    words_OW: Tensor = lanes.sum(-1, dtype=torch.uint8).view(torch.int32)
    return words_OW


def unpack_bits(words_OW: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_bits`.

    Args:
        words_OW: int32, any leading shape.
        num_columns: I, the columns that were packed.

    Returns:
        bool, last dimension I.
    """
    return _unpack_bytes(words_OW)[..., :num_columns].bool()


def _byte_shifts(like: Tensor) -> Tensor:
    """Bit positions inside a byte; a word is four bytes, lowest first, as on every machine torch supports."""
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _unpack_bytes(words_OW: Tensor) -> Tensor:
    """Return every bit as a uint8 of 0 or 1; working on bytes keeps the temporaries small."""
    lanes = words_OW.contiguous().view(torch.uint8).unsqueeze(-1) >> _byte_shifts(words_OW)
    return lanes.bitwise_and_(1).flatten(-2)


def pack_signs(weight_OI: Tensor) -> Tensor:
    """Pack the signs of a matrix; zero counts as positive. Returns int32 [..., O, W]."""
    return pack_bits(weight_OI < 0)


def unpack_signs(words_OW: Tensor, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix of +1 and -1, shape [..., O, I]."""
    return 1 - 2 * unpack_bits(words_OW, num_columns).to(dtype)


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack integer codes as bit planes.

    Args:
        codes_OI: integer, 0 <= code < 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [bits, O, W].
    """
    return torch.stack([pack_bits((codes_OI >> plane) & 1 == 1) for plane in range(bits)])  # one at a time: less memory


def unpack_codes(planes_BOW: Tensor, num_columns: int) -> Tensor:
    """Undo `pack_codes`: uint8 [O, I]."""
    codes_OI = _unpack_bytes(planes_BOW[0])
    for plane in range(1, planes_BOW.shape[0]):
        codes_OI |= _unpack_bytes(planes_BOW[plane]) << plane
    return codes_OI[..., :num_columns]

"""Bits to signs in registers: one shift and one three-input logic instruction for two weights.

    (half << (15 - j)) & 0x8000  |  one          the IEEE sign bit of +-1.0 (bfloat16 0x3f80, float16 0x3c00)

A register holds two int16 halves, so both instructions work on two weights (`lop3` computes (a & b) | c). `one` may be
any power of two: digit q of an integer code becomes +-2^q for nothing. The halves' bits are ordered (`prepack`) such
that what a thread makes from its own halves is exactly its fragment of the tensor-core instruction; rows of a tile are
loaded in the order `fragment_rows` gives for the same reason. So weights never pass through shared memory once they are
unpacked.

Triton's interpreter has no inline assembly and no bfloat16 arithmetic; EMULATE takes the same steps in plain
operations.
"""

# ruff: noqa: ANN001, ANN201, ANN202, PLR0913
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl


@triton.constexpr_function
def assembly(count, half_type, exponent):
    """Write the instructions that turn bits 0..count-1 of two halves into `count` registers of two +-2^exponent."""
    one = 0x3C00 + (exponent << 10) if half_type == "fp16" else 0x3F80 + (exponent << 7)
    lines = [
        f"shl.b32 t, ${count}, {15 - bit}; lop3.b32 ${bit}, t, 0x80008000, {one * 0x10001:#x}, 0xEA;"
        for bit in range(count)
    ]
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


@triton.constexpr_function
def _registers(count):
    """Name the registers of `assembly`: outputs first, then the halves."""
    return ",".join(["=r"] * count + ["r"])


@triton.constexpr_function
def outputs(count, dtype):
    """Return the types of an assembly's results. A global constant would be compared at every launch."""
    return (dtype,) * count


@triton.constexpr_function
def _name(dtype):
    """Return fp16 or bf16."""
    return str(dtype)


@triton.jit
def fragment_rows(BN: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Return the rows of a tile in the order (register, warp, lane) of the instruction's left operand."""
    row = tl.arange(0, BN)
    tile = (row // (16 * NUM_WARPS)) * (16 * NUM_WARPS)
    return tile + ((row % (8 * NUM_WARPS)) // 8) * 16 + ((row // (8 * NUM_WARPS)) % 2) * 8 + row % 8


@triton.jit
def _join4(o0, o1, o2, o3):
    """Stack four tensors along new last dimensions, the first argument's index varying slowest bit last."""
    return tl.join(tl.join(o0, o2), tl.join(o1, o3))


@triton.jit
def _join8(o0, o1, o2, o3, o4, o5, o6, o7):
    a0, a1, a2, a3 = tl.join(o0, o4), tl.join(o1, o5), tl.join(o2, o6), tl.join(o3, o7)
    return _join4(a0, a1, a2, a3)


@triton.jit
def _emulated(halves, EXPONENT: tl.constexpr, COUNT: tl.constexpr, dtype: tl.constexpr):
    """Return [rows, halves, COUNT] of +-2^EXPONENT by plain operations."""
    bits = (halves.to(tl.int32)[:, :, None] >> tl.arange(0, COUNT)[None, None, :]) & 1
    return tl.where(bits != 0, -1.0 * (1 << EXPONENT), 1.0 * (1 << EXPONENT)).to(dtype)


@triton.jit
def expand(halves, EXPONENT: tl.constexpr, COUNT: tl.constexpr, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Return [rows, halves, COUNT] of +-2^EXPONENT from the low COUNT bits of int16 halves."""
    ASM: tl.constexpr = assembly(COUNT, _name(dtype), EXPONENT)
    REGISTERS: tl.constexpr = _registers(COUNT)
    if EMULATE:
        signs = _emulated(halves, EXPONENT, COUNT, dtype)
    elif COUNT == 16:
        o0, o1, o2, o3, o4, o5, o6, o7, o8, o9, o10, o11, o12, o13, o14, o15 = tl.inline_asm_elementwise(
            ASM, REGISTERS, [halves], dtype=outputs(16, tl.int16), is_pure=True, pack=2
        )
        signs = _join8(tl.join(o0, o8), tl.join(o1, o9), tl.join(o2, o10), tl.join(o3, o11),
                       tl.join(o4, o12), tl.join(o5, o13), tl.join(o6, o14), tl.join(o7, o15))  # fmt: skip
    elif COUNT == 8:
        o0, o1, o2, o3, o4, o5, o6, o7 = tl.inline_asm_elementwise(
            ASM, REGISTERS, [halves], dtype=outputs(8, tl.int16), is_pure=True, pack=2
        )
        signs = _join8(o0, o1, o2, o3, o4, o5, o6, o7)
    else:
        o0, o1, o2, o3 = tl.inline_asm_elementwise(
            ASM, REGISTERS, [halves], dtype=outputs(4, tl.int16), is_pure=True, pack=2
        )
        signs = _join4(o0, o1, o2, o3)
    if not EMULATE:
        signs = signs.reshape(halves.shape[0], halves.shape[1], COUNT).to(dtype, bitcast=True)
    return signs


@triton.jit
def fragments(
    halves, EXPONENT: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, dtype: tl.constexpr,
    NUM_WARPS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Return the signs [rows, columns] of one of PARTS equal runs of the columns of every 128-column block.

    Args:
        halves: int16 [rows in fragment order, 8 * blocks].
        EXPONENT: of the magnitude 2^EXPONENT.
        PARTS: 1, 2 or 4: a part is 128, 64 or 32 columns.
        PART: which.
        dtype: of the result.
        NUM_WARPS: of the program.
        EMULATE: avoid inline assembly.
    """
    COUNT: tl.constexpr = 16 // PARTS
    BN: tl.constexpr = halves.shape[0]
    BLOCKS: tl.constexpr = halves.shape[1] // 8
    if PART > 0:
        halves = halves >> (PART * COUNT)
    signs = expand(halves, EXPONENT, COUNT, dtype, EMULATE)
    signs = signs.reshape(BN // (16 * NUM_WARPS), 2, NUM_WARPS, 8, BLOCKS, 8, COUNT)
    return signs.permute(0, 2, 1, 3, 4, 6, 5).reshape(BN, BLOCKS * 8 * COUNT)

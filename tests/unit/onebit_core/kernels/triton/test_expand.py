"""The two instructions that make signs of bits, executed here by hand: the interpreter cannot run assembly."""

import re

import pytest

pytest.importorskip("triton")

import torch

from onebit_core.kernels.triton import expand, int8_gemm

SHIFTS = {"shl": lambda word, by: word << by & 0xFFFFFFFF, "shr": lambda word, by: word >> by}
STEP = re.compile(
    r"(shl|shr)\.[bu]32 t, \$\d+, (\d+); (?:lop3\.b32 \$(\d+), t, (0x[0-9a-f]+|\d+), (0x[0-9a-f]+), 0xEA"
    r"|and\.b32 \$(\d+), t, (0x[0-9a-f]+));"
)


def run(assembly: str, word: int) -> dict[int, int]:
    """Return output register to value; lop3 with table 0xEA is (a & b) | c."""
    outputs = {}
    for shift, by, lop, mask, value, conjunction, and_mask in STEP.findall(assembly):
        shifted = SHIFTS[shift](word, int(by))
        if lop:
            outputs[int(lop)] = shifted & int(mask, 0) | int(value, 0)
        else:
            outputs[int(conjunction)] = shifted & int(and_mask, 0)
    return outputs


def as_floats(word: int, dtype: torch.dtype) -> list[float]:
    """Read a register as its low and high half."""
    return torch.tensor([word], dtype=torch.uint32).view(torch.int16).view(dtype).tolist()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("exponent", [0, 3, 7])
@pytest.mark.parametrize("count", [16, 8, 4])
def test_bit_j_of_each_half_becomes_the_sign_of_output_j(count, exponent, name, dtype):
    word = 0xA5C3_1E78
    outputs = run(expand.assembly(count, name, exponent), word)
    assert sorted(outputs) == list(range(count))
    for bit, register in outputs.items():
        signs = [-1 if word >> place & 1 else 1 for place in (bit, 16 + bit)]
        assert as_floats(register, dtype) == [sign * 2.0**exponent for sign in signs]


@pytest.mark.parametrize("exponent", [0, 3, 6])
def test_bit_j_of_each_byte_becomes_zero_or_a_power_of_two(exponent):
    word = 0xA5C3_1E78
    outputs = run(int8_gemm.assembly(exponent), word)
    assert sorted(outputs) == list(range(8))
    for bit, register in outputs.items():
        for byte in range(4):
            expected = (word >> (8 * byte + bit) & 1) << exponent
            assert register >> (8 * byte) & 0xFF == expected

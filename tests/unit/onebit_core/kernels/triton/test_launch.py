"""Every launch as on a GPU, but for the GPU: arguments bind, kernels compile and fit, grids are legal."""

import pytest

pytest.importorskip("triton")

import torch
import triton

from onebit_core.kernels import triton as backend
from onebit_core.kernels.triton import launch, tiles
from tests.support.random_operands import STRUCTURES
from tests.support.triton_driver import recording

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret or tiles.triton_version() < (3, 8), reason="needs Triton's compiler, 3.8 or later"
)


@pytest.mark.parametrize(
    ("structure", "tokens", "kernels"),
    [
        ("sign", 1, ["sign_gemm"]),
        ("two terms with input scales", 3, ["sign_gemm"]),
        ("two terms with input scales", 17, ["scale_tokens", "sign_gemm"]),
        ("salient with input scales", 1, ["sparse_rows", "sign_gemm", "sign_gemm"]),
        ("salient", 600, ["dequantize_planes", "scatter_rows"]),
        ("bytes", 1, ["byte_gemm"]),
        ("bytes", 600, ["dequantize_bytes"]),
    ],
)
def test_few_launches_and_all_of_them_legal(structure, tokens, kernels):
    packed = backend.pack(STRUCTURES[structure](70, 1100, "cpu"))
    x = torch.randn(tokens, 1100).bfloat16()
    with recording(90) as driver:
        y = backend.matmul(x, packed.parts, packed.layout)
    assert driver.launches == kernels
    assert y.shape == (tokens, 70)


def test_int8_activations_take_two_launches():
    packed = backend.pack(STRUCTURES["code of 4 bits"](70, 1100, "cpu"), act="int8")
    with recording(90) as driver:
        backend.matmul(torch.randn(3, 1100).half(), packed.parts, packed.layout)
    assert driver.launches == ["quantize_tokens", "int8_gemm"]


def test_a_product_that_fills_no_device_is_split_with_zeroed_counters():
    """The grid has a third dimension, and launching allocates nothing that must be cleared."""
    packed = backend.pack(STRUCTURES["sign"](70, 8192, "cpu"))
    x = torch.randn(1, 8192).half()
    assert launch.choose(packed.layout, x.dtype, x.device, 1).splits > 1
    with recording(80) as driver:
        backend.matmul(x, packed.parts, packed.layout)
    assert driver.launches == ["sign_gemm"]

"""The machine code of the GPU kernels, without a GPU: what makes them fast is there, for every architecture.

Weights must go from global memory through asynchronous copies to registers and from there into the tensor core. Stores
to shared memory are few and belong to the end of the kernel; if Triton ever moves unpacked weights through shared
memory, 16 stores a plane appear, as before Triton 3.8.
"""

import pytest

pytest.importorskip("triton")

import triton

from onebit_core.kernels.triton import tiles
from onebit_core.kernels.triton.byte_gemm import byte_gemm
from onebit_core.kernels.triton.dequantize import dequantize_bytes, dequantize_planes, scale_tokens
from onebit_core.kernels.triton.int8_gemm import int8_gemm, quantize_tokens
from onebit_core.kernels.triton.paged_attention import KEYS_AT_ONCE, attend_split, join_splits
from onebit_core.kernels.triton.sign_gemm import sign_gemm
from onebit_core.kernels.triton.sparse import scatter_rows, sparse_rows
from tests.support.triton_compile import compile_kernel

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret or tiles.triton_version() < (3, 8), reason="needs Triton's compiler, 3.8 or later"
)

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
FEW_STORES = 10
FLOATS = dict.fromkeys(("c_ptr", "b_ptr", "gain_ptr", "add_ptr", "bias_ptr", "partial_ptr"), "*fp32")
PLAIN = {"PLANES": 1, "CODE": 1, "GROUPED": 0, "PARTS": 1, "SHIFT": 0, "HAS_GAIN": 0}
STRUCTURES = {
    "sign": (PLAIN, 1, 0),
    "sign with input scale": (PLAIN | {"HAS_GAIN": 1}, 1, 0),
    "code of 4 bits, groups of 128": (PLAIN | {"PLANES": 4, "GROUPED": 1, "SHIFT": 1}, 5, 128),
    "three planes, groups": (PLAIN | {"PLANES": 3, "CODE": 0, "GROUPED": 1, "SHIFT": 1}, 4, 128),
    "groups of 32": (PLAIN | {"GROUPED": 1, "PARTS": 4}, 1, 32),
}


def compile_sign_gemm(architecture, constants, tile, dtype="bf16"):
    common = {"TERMS": 1, "HAS_ADD": 0, "HAS_BIAS": 1, "SPLIT": 1, "EVEN_K": 1, "EMULATE": 0}
    cut = {"BN": tile.rows, "BM": tile.tokens, "BK": tile.columns, "NUM_WARPS": tile.warps, "NUM_STAGES": tile.stages}
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "w_ptr": "*i32", "counter_ptr": "*i32", **FLOATS}
    return compile_kernel(
        sign_gemm, architecture, types, constants | common | cut, warps=tile.warps, stages=tile.stages
    )  # fmt: skip


def tile_for(architecture, tokens, products, group_size, dtype="bf16"):
    gpu = tiles.Gpu("test", architecture, 100)
    product = tiles.Product("planes", 4096, 4096, products, group_size, dtype)
    return tiles.tile_by_rule(gpu, product, tokens)


def assert_fast(compiled, architecture, planes):
    assert compiled.matrix_instructions >= 8 * planes
    assert compiled.ttgir.count("async_copy_global_to_local") >= 2
    assert "local_store" not in compiled.ttgir
    assert compiled.count("STS") <= FEW_STORES
    assert compiled.count("LDL", "STL") == 0
    assert compiled.shared_bytes <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize("architecture", [80, 90, 120])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_stay_in_registers(structure, architecture):
    constants, products, group_size = STRUCTURES[structure]
    tile = tile_for(architecture, 8, products, group_size)
    assert_fast(compile_sign_gemm(architecture, constants, tile), architecture, constants["PLANES"])


@pytest.mark.parametrize(
    ("architecture", "tokens", "dtype"), [(80, 64, "bf16"), (90, 64, "fp16"), (90, 16, "fp16"), (120, 128, "bf16")]
)
def test_wider_tiles_stay_in_registers_too(architecture, tokens, dtype):
    tile = tile_for(architecture, tokens, 1, 0)
    assert_fast(compile_sign_gemm(architecture, PLAIN, tile, dtype), architecture, 1)


def test_hopper_uses_its_own_tensor_core_instruction():
    compiled = compile_sign_gemm(90, PLAIN, tile_for(90, 64, 1, 0))
    assert "ttng.warp_group_dot" in compiled.ttgir
    assert compiled.count("HGMMA") >= 8


@pytest.mark.parametrize("architecture", [80, 90])
def test_float32_is_three_exact_products(architecture):
    once = compile_sign_gemm(architecture, PLAIN, tile_for(architecture, 8, 1, 0))
    thrice = compile_sign_gemm(architecture, PLAIN, tile_for(architecture, 8, 1, 0, "fp32"), "fp32")
    assert thrice.matrix_instructions == 3 * once.matrix_instructions
    assert thrice.count("LDL", "STL") == 0


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_bytes_go_through_tensor_cores(architecture):
    types = {"x_ptr": "*fp16", "y_ptr": "*fp16", "w_ptr": "*i8", "counter_ptr": "*i32", **FLOATS}
    constants = {"BN": 64, "BM": 8, "NUM_STAGES": 4, "HAS_BIAS": 1, "SPLIT": 1, "EVEN_K": 1, "EMULATE": 0}
    assert_fast(compile_kernel(byte_gemm, architecture, types, constants), architecture, 1)


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_integer_activations_use_integer_tensor_cores(architecture):
    pointers = {"q_ptr": "*i8", "step_ptr": "*fp32", "sum_ptr": "*fp32", "w_ptr": "*i32", "a_ptr": "*fp32"}
    types = {**pointers, "y_ptr": "*bf16", "counter_ptr": "*i32", **FLOATS}
    constants = {"BN": 64, "BM": 64, "NUM_WARPS": 4, "NUM_STAGES": 4, "PLANES": 1, "HAS_ADD": 0, "HAS_BIAS": 1}
    compiled = compile_kernel(int8_gemm, architecture, types, constants | {"SPLIT": 0, "EMULATE": 0})
    assert compiled.count("IMMA", "IGMMA") >= 4
    assert compiled.count("STS") <= FEW_STORES
    assert compiled.count("LDL", "STL") == 0


SPARSE = {"starts_ptr": "*i32", "columns_ptr": "*i16", "codes_ptr": "*u8", "scale_ptr": "*fp32", "zero_ptr": "*fp32"}
SMALL_KERNELS = {
    "quantize_tokens": (
        quantize_tokens,
        {"x_ptr": "*bf16", "q_ptr": "*i8", "step_ptr": "*fp32", "sum_ptr": "*fp32"},
        {"BK": 1024},
        4,
    ),
    "sparse_rows": (
        sparse_rows,
        {"x_ptr": "*fp16", "y_ptr": "*fp32", "offset_ptr": "*fp32", "gain_ptr": "*fp32", **SPARSE},
        {"BM": 8, "CHUNK": 128, "TERMS": 2, "HAS_GAIN": 1},
        1,
    ),
    "scatter_rows": (scatter_rows, {"dense_ptr": "*bf16", **SPARSE}, {"CHUNK": 128}, 1),
    "dequantize_planes": (
        dequantize_planes,
        {"w_ptr": "*i32", "c_ptr": "*fp16", "b_ptr": "*fp32", "gain_ptr": "*fp32", "dense_ptr": "*bf16"},
        {"BN": 16, "TERMS": 2, "PLANES": 3, "CODE": 0, "SHIFT": 1, "HAS_GAIN": 1, "ADD": 1},
        4,
    ),
    "dequantize_bytes": (
        dequantize_bytes,
        {"w_ptr": "*i8", "scale_ptr": "*fp32", "dense_ptr": "*bf16"},
        {"BK": 1024},
        4,
    ),
    "scale_tokens": (scale_tokens, {"x_ptr": "*fp16", "gain_ptr": "*fp32", "out_ptr": "*fp16"}, {"BK": 1024}, 4),
}


@pytest.mark.parametrize("name", SMALL_KERNELS)
def test_small_kernels_compile_without_spills(name):
    kernel, types, constants, warps = SMALL_KERNELS[name]
    assert compile_kernel(kernel, 90, types, constants, warps=warps).count("LDL", "STL") == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_paged_attention_uses_the_tensor_core_and_no_local_memory(architecture, dtype):
    """Both products of a split in matrix instructions (float32 is exact, so not there); registers suffice."""
    shape = {"KEY_HEADS": 8, "GROUP": 4, "ROWS": 16, "DIM": 128, "COLUMNS": 128, "SPLIT": 256}
    cut = {"PAGE": 16, "AT_ONCE": KEYS_AT_ONCE[4 if dtype == "fp32" else 2], "HAS_CAP": 0}
    sums = dict.fromkeys(("top_ptr", "sum_ptr", "part_ptr"), "*fp32") | {"scale": "fp32", "cap": "fp32"}
    data = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "y_ptr"), f"*{dtype}")
    types = {**sums, **data, "table_ptr": "*i64", "length_ptr": "*i32"}
    split = compile_kernel(attend_split, architecture, types, shape | cut, stages=2)
    join = compile_kernel(join_splits, architecture, types, shape)
    assert split.shared_bytes <= SHARED_LIMIT[architecture]
    assert split.count("LDL", "STL") == join.count("LDL", "STL") == 0
    if dtype != "fp32":
        assert split.matrix_instructions >= 8

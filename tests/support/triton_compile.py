"""Compiles GPU kernels on a machine without a GPU, and counts what came out.

Triton's compiler needs no device: given types, constants and which arguments are divisible by 16 it makes the same
machine code as a launch would. ptxas and the disassembler come in Triton's wheel.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SASS_LINE = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b")


@dataclass(frozen=True)
class Compiled:
    """A kernel's middle form, machine code and shared memory."""

    ttgir: str
    instructions: Counter[str]
    shared_bytes: int

    def count(self, *names: str) -> int:
        """Return how many machine instructions have one of these names."""
        return sum(self.instructions[name] for name in names)

    @property
    def matrix_instructions(self) -> int:
        """Tensor-core instructions."""
        return self.count("HMMA", "HGMMA", "IMMA", "IGMMA")


def compile_kernel(
    kernel: Any, architecture: int, types: dict[str, str], constants: dict[str, Any], *, warps: int = 4, stages: int = 4
) -> Compiled:
    """Compile for an architecture such as 90.

    Args:
        kernel: a triton.jit function.
        architecture: compute capability without its point.
        types: of pointer arguments, such as `*bf16`; every other argument that is no constant is an int32.
        constants: values of the constexpr arguments.
        warps: of a program.
        stages: of pipelined loops.
    """
    signature, divisible = {}, {}
    for index, parameter in enumerate(kernel.params):
        kind = "constexpr" if parameter.is_constexpr else types.get(parameter.name, "i32")
        signature[parameter.name] = kind
        if kind != "constexpr" and not parameter.do_not_specialize:
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(made.asm["ttgir"], _instructions(made.asm["cubin"]), made.metadata.shared)


def _instructions(cubin: bytes) -> Counter[str]:
    """Count machine instructions by name, without their modifiers."""
    disassembler = ["nvdisasm", "-c"] if (TOOLS / "nvdisasm").exists() else ["cuobjdump", "-sass"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / disassembler[0]), disassembler[1], file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (SASS_LINE.match(line) for line in text.splitlines())
    return Counter(match.group(1).split(".")[0] for match in found if match)

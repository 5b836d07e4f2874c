"""Packed.layout of this backend: a plan in integers, and which tensor of Packed.parts is which.

0 O   1 I   2 TRITON_CODE   3 FORMAT   4 kind   5 has bias   6 salient terms, -1 for none   7 salient groups
8 salient gains   9 ... Stack fields of every stack

parts: of every stack words, coefficient, [shift], [gain]; or codes, scale of a byte matrix; then the salient tensors;
then the bias
"""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache

from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels.planes import TRITON_CODE
from onebit_core.kernels.triton.prepack import STACK_FIELDS, Stack

FORMAT = 1
PLANES_KIND, BYTES_KIND, INT8_KIND = range(3)
KIND_NAMES = ("planes", "bytes", "int8")
HEADER = 9


@dataclass(frozen=True)
class Plan:
    """What `matmul` has to do.

    Attributes:
        out_features: O.
        in_features: I.
        kind: PLANES_KIND, BYTES_KIND or INT8_KIND.
        stacks: one launch each.
        has_bias: whether the last part is a bias.
        sparse: (terms, groups, has gains) of the salient weights, or None.
    """

    out_features: int
    in_features: int
    kind: int
    stacks: tuple[Stack, ...]
    has_bias: bool
    sparse: tuple[int, int, int] | None

    def to_layout(self) -> tuple[int, ...]:
        """Return the plan in integers."""
        header = (self.out_features, self.in_features, TRITON_CODE, FORMAT, self.kind, int(self.has_bias))
        sparse = (-1, 0, 0) if self.sparse is None else self.sparse
        return (*header, *sparse, *(number for stack in self.stacks for number in astuple(stack)))

    @property
    def products(self) -> int:
        """Tensor-core products per weight."""
        return sum(stack.terms * (stack.planes + stack.has_shift) for stack in self.stacks) or 1

    @property
    def group_size(self) -> int:
        """Columns of the smallest group, 0 if every coefficient is of a row."""
        return min((stack.group_size for stack in self.stacks if stack.is_grouped), default=0)


@lru_cache(maxsize=4096)
def plan_of(layout: tuple[int, ...]) -> Plan:
    """Undo `Plan.to_layout`.

    Raises:
        KernelError: packed by another version.
    """
    if layout[2:4] != (TRITON_CODE, FORMAT) or (len(layout) - HEADER) % STACK_FIELDS:
        raise KernelError(f"layout {layout[:5]} is not one of this version's GPU kernels: load the model again")
    fields = layout[HEADER:]
    stacks = tuple(Stack(*fields[i : i + STACK_FIELDS]) for i in range(0, len(fields), STACK_FIELDS))
    sparse = None if layout[6] < 0 else (layout[6], layout[7], layout[8])
    return Plan(layout[0], layout[1], layout[4], stacks, bool(layout[5]), sparse)


@dataclass(frozen=True)
class StackParts:
    """Tensors of a stack, see `prepack`. Absent ones are the coefficient, which is then never read as them."""

    words: Tensor
    coefficient: Tensor
    shift: Tensor
    gain: Tensor


@dataclass(frozen=True)
class Parts:
    """Packed.parts by name."""

    stacks: tuple[StackParts, ...]
    bytes_: tuple[Tensor, ...]
    sparse: tuple[Tensor, ...]
    bias: Tensor | None


def parts_of(plan: Plan, parts: Sequence[Tensor]) -> Parts:
    """Give the tensors their names."""
    rest = iter(parts)
    stacks = tuple(_stack_parts(stack, rest) for stack in plan.stacks)
    bytes_ = (next(rest), next(rest)) if plan.kind == BYTES_KIND else ()
    sparse: tuple[Tensor, ...] = ()
    if plan.sparse is not None:
        terms, _, has_gain = plan.sparse
        sparse = tuple(next(rest) for _ in range(5 + (terms > 0) + has_gain))
    return Parts(stacks, bytes_, sparse, next(rest) if plan.has_bias else None)


def _stack_parts(stack: Stack, rest: Iterator[Tensor]) -> StackParts:
    """Take the tensors of one stack."""
    words, coefficient = next(rest), next(rest)
    shift = next(rest) if stack.has_shift else coefficient
    return StackParts(words, coefficient, shift, next(rest) if stack.has_gain else coefficient)

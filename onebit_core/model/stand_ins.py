"""Modules that stand in the places of decoder blocks for a while: to run them again, to skip them, to see their inputs.

Shape suffixes: B = sequences, T = tokens, D = hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class StandIn(nn.Module):
    """Stands in the place of a block; attributes that models ask blocks for are the block's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)


def _run_again(block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(block, hidden, *args, use_reentrant=False, **kwargs)


class Recomputed(StandIn):
    """Runs its block, and again in the backward pass, in place of keeping what is in between."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block, now and in the backward pass."""
        return _run_again(self.__dict__["block"], hidden, *args, **kwargs)


class Watched(StandIn):
    """Runs its block, again in the backward pass if asked to, and notes what comes in."""

    def __init__(self, block: nn.Module, seen: list[Tensor], *, recompute: bool) -> None:
        super().__init__(block)
        self.__dict__["seen"] = seen
        self.__dict__["recompute"] = recompute

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        self.__dict__["seen"].append(hidden)
        block = self.__dict__["block"]
        if self.__dict__["recompute"]:
            return _run_again(block, hidden, *args, **kwargs)
        return block(hidden, *args, **kwargs)


class Given(StandIn):
    """Returns hidden states that are known, whatever comes in."""

    def __init__(self, block: nn.Module, hidden: Tensor | None) -> None:
        super().__init__(block)
        self.__dict__["hidden"] = hidden

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what was given."""
        del args, kwargs
        given = self.__dict__["hidden"]
        return hidden if given is None else given


@contextmanager
def in_places(blocks: nn.ModuleList, stand_ins: list[nn.Module]) -> Iterator[None]:
    """Put modules in the places of blocks for a while."""
    real = list(blocks)
    for index, module in enumerate(stand_ins):
        blocks[index] = module
    try:
        yield
    finally:
        for index, block in enumerate(real):
            blocks[index] = block


def recomputed(blocks: nn.ModuleList) -> Any:
    """Let blocks be run again in the backward pass, so that what is inside of one is in memory at a time."""
    return in_places(blocks, [Recomputed(block) for block in blocks])


def given_hidden(blocks: nn.ModuleList, hidden: Tensor) -> Any:
    """Let the model end with the given hidden states in place of computing them."""
    last = len(blocks) - 1
    return in_places(blocks, [Given(block, hidden if i == last else None) for i, block in enumerate(blocks)])


@contextmanager
def watched(blocks: nn.ModuleList, *, recompute: bool = False) -> Iterator[list[Tensor]]:
    """Yield a list that a run of the model fills with every block's input [B, T, D], first block first."""
    seen: list[Tensor] = []
    with in_places(blocks, [Watched(block, seen, recompute=recompute) for block in blocks]):
        yield seen

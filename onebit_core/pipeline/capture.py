"""Records the inputs of the first block and carries them through one quantized block after the other.

The skeleton runs once with every block replaced by one that only notes its arguments: the hidden states it passes on
are the input of the first block, and the other arguments (position embeddings, masks, which may differ by block) serve
all later runs, since all samples have the same length.

Shape suffixes: S = samples, T = tokens, D = hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.calibration.statistics import InputStatistics, StatisticsAccumulator, fast_float32_products
from onebit_core.model.loading import OriginalModel


class _StopBlock(Exception):
    """Raised by a hook once it has what it wanted; the rest of the block need not run."""


class _NotingBlock(nn.Module):
    """Stands in for a block: notes its keyword arguments and returns its input."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.like = (like,)  # attributes of the original block are read by some models

    def __getattr__(self, name: str) -> Any:
        if name in ("like", "arguments") or name.startswith("_"):
            return super().__getattr__(name)
        return getattr(self.__dict__["like"][0], name)

    def forward(self, hidden_STD: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note and pass on."""
        assert not args, "blocks are called with keyword arguments"
        self.arguments = kwargs
        return hidden_STD


class CapturedInputs:
    """The calibration activations at the input of the next block.

    Attributes:
        hidden_STD: float32 [S, T, D], on the CPU.
        original_STD: what the original has there, likewise; only if `follow_original` was called.
    """

    def __init__(self, original: OriginalModel, ids_ST: Tensor, device: str) -> None:
        self.device = device
        self.ids_ST = ids_ST
        self._arguments: list[dict[str, Any]] = []
        self.hidden_STD = self._run_outer(original)
        self.original_STD: Tensor | None = None

    @torch.no_grad()
    def statistics(self, block: nn.Module, linear_name: str, first_token_weight: float) -> InputStatistics:
        """Run all samples up to one linear of a block and return the statistics of its input."""
        linear: Any = block.get_submodule(linear_name)  # a plain linear, or the layer that already took its place
        accumulator = StatisticsAccumulator(
            linear.in_features, first_token_weight=first_token_weight, device=self.device
        )

        def record(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            del module
            x = arguments[0]
            accumulator.add(x.reshape(-1, self.ids_ST.shape[1], x.shape[-1]))
            raise _StopBlock

        with _hooked(linear, record):
            for hidden_TD in self.hidden_STD:
                try:
                    self._run_block(block, hidden_TD)
                except _StopBlock:
                    continue
        return accumulator.finish()

    def follow_original(self) -> None:
        """Carry the original's own activations along, from the first block on."""
        self.original_STD = self.hidden_STD.clone()

    @torch.no_grad()
    def advance_original(self, block: nn.Module) -> None:
        """Carry the original's activations through its own block, before that is quantized."""
        if self.original_STD is not None:
            for sample, hidden_TD in enumerate(self.original_STD):
                self.original_STD[sample] = self._run_block(block, hidden_TD).cpu()

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Carry the samples through a finished block: its outputs become the next inputs."""
        for sample, hidden_TD in enumerate(self.hidden_STD):
            self.hidden_STD[sample] = self._run_block(block, hidden_TD).cpu()
        self._arguments.pop(0)

    @torch.no_grad()
    def outputs(self, block: nn.Module) -> Tensor:
        """Return what a block makes of the samples as they are now, float32 [S, T, D], on the CPU."""
        return torch.stack([self._run_block(block, hidden_TD).cpu() for hidden_TD in self.hidden_STD])

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Run a batch of samples through a block, with gradients where they are enabled: [B, T, D] to [B, T, D]."""
        with fast_float32_products():
            result = block(hidden_BTD.to(self.device), **self._arguments[0])
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output.reshape(hidden_BTD.shape)

    def _run_block(self, block: nn.Module, hidden_TD: Tensor) -> Tensor:
        """Run one sample through a block: [T, D] to [T, D]."""
        return self.run(block, hidden_TD[None])[0]

    @torch.no_grad()
    def _run_outer(self, original: OriginalModel) -> Tensor:
        """Run everything before the first block on all samples, noting every block's arguments."""
        blocks = original.blocks
        real = list(blocks)
        noting = [_NotingBlock(block) for block in real]
        outputs: list[Tensor] = []
        remember: Callable[..., None] = lambda _module, arguments: outputs.append(arguments[0][0].cpu())  # noqa: E731
        try:
            for index, stand_in in enumerate(noting):
                blocks[index] = stand_in
            with _hooked(noting[0], remember):
                for ids_T in self.ids_ST:
                    original.model.base_model(input_ids=ids_T[None].to(self.device), use_cache=False)
        finally:
            for index, block in enumerate(real):
                blocks[index] = block
        self._arguments = [block.arguments for block in noting]
        return torch.stack(outputs)


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Watch a module's inputs; the hook always comes off."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

"""Records the inputs of the first block and carries them through one quantized block after the other.

The skeleton runs once with every block replaced by one that only notes its arguments: the hidden states it passes on
are the input of the first block, and the other arguments (position embeddings, masks, which may differ by block) serve
all later runs, since all samples have the same length.

The samples are kept in memory, or in a file that is mapped into it: the same tensors, so the same results bit for bit,
whose pages the operating system writes out and reads back as it likes. The file is filled with zeros first, so that a
full disk is known at once, and unlinked while open, so that it is gone however the process ends.

Shape suffixes: S = samples, T = tokens, D = hidden size.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.calibration.sampling import evenly
from onebit_core.calibration.statistics import InputStatistics, StatisticsAccumulator, fast_float32_products
from onebit_core.errors import CalibrationError
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


def empty_samples(shape: torch.Size | tuple[int, ...], folder: Path | None) -> Tensor:
    """Return room for activations, float32, in memory or in an unnamed file inside of a folder.

    Raises:
        CalibrationError: the folder has no room for them, or cannot be written.
    """
    if folder is None:
        return torch.empty(shape)
    size = torch.Size(shape).numel()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".activations-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, size * torch.float32.itemsize)
            return torch.from_file(name, shared=True, size=size, dtype=torch.float32).view(shape)
        finally:
            os.close(descriptor)
            Path(name).unlink()
    except OSError as error:
        raise CalibrationError(
            f"{folder}: cannot hold {size * torch.float32.itemsize / 2**30:.1f} GiB of activations ({error.strerror}); "
            "use a --work-dir on another disk, fewer or shorter samples, or --activations memory"
        ) from error


class CapturedInputs:
    """The calibration activations at the input of the next block.

    Attributes:
        hidden_STD: float32 [S, T, D], on the CPU.
        original_STD: what the original has there, likewise; only if `follow_original` was called.
        folder: where activations are kept on disk; None for in memory.
        recorded: places of the samples that statistics are recorded on.
    """

    def __init__(
        self,
        original: OriginalModel,
        ids_ST: Tensor,
        device: str,
        folder: Path | None = None,
        *,
        recorded: int | None = None,
    ) -> None:
        """Run all samples up to the first block.

        Args:
            original: the model, with what is outside of its blocks loaded.
            ids_ST: int64 [S, T].
            device: where blocks are run.
            folder: for activations on disk.
            recorded: how many samples statistics are recorded on, evenly over all; None for all of them.
        """
        self.recorded = evenly(len(ids_ST), recorded or len(ids_ST)).tolist()
        self.device = device
        self.ids_ST = ids_ST
        self.folder = folder
        self._arguments: list[dict[str, Any]] = []
        self.hidden_STD = self._run_outer(original)
        self.original_STD: Tensor | None = None
        self._outputs_STD: Tensor | None = None

    def statistics(self, block: nn.Module, linear_name: str, first_token_weight: float) -> InputStatistics:
        """Run samples up to one linear of a block and return the statistics of its input."""
        linear: Any = block.get_submodule(linear_name)  # a plain linear, or the layer that already took its place
        accumulator = StatisticsAccumulator(
            linear.in_features, first_token_weight=first_token_weight, device=self.device
        )

        def record(arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            accumulator.add(x.reshape(-1, self.ids_ST.shape[1], x.shape[-1]))

        self.run_up_to(block, linear_name, record)
        return accumulator.finish()

    @torch.no_grad()
    def run_up_to(self, block: nn.Module, name: str, record: Callable[[tuple[Tensor, ...]], None]) -> None:
        """Run the samples to record one by one up to a module of a block, whose arguments are given to `record`."""

        def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            del module
            record(arguments)
            raise _StopBlock

        with _hooked(block.get_submodule(name), stop):
            for sample in self.recorded:
                try:
                    self._run_block(block, self.hidden_STD[sample])
                except _StopBlock:
                    continue

    def follow_original(self) -> None:
        """Carry the original's own activations along, from the first block on."""
        self.original_STD = empty_samples(self.hidden_STD.shape, self.folder).copy_(self.hidden_STD)

    @torch.no_grad()
    def advance_original(self, block: nn.Module) -> None:
        """Carry the original's activations through its own block, before that is quantized."""
        if self.original_STD is not None:
            for sample, hidden_TD in enumerate(self.original_STD):
                self.original_STD[sample] = self._run_block(block, hidden_TD)

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Carry the samples through a finished block: its outputs become the next inputs."""
        for sample, hidden_TD in enumerate(self.hidden_STD):
            self.hidden_STD[sample] = self._run_block(block, hidden_TD)
        self._arguments.pop(0)

    @torch.no_grad()
    def outputs(self, block: nn.Module) -> Tensor:
        """Return what a block makes of the samples as they are now, float32 [S, T, D], on the CPU.

        The next call writes over it.
        """
        if self._outputs_STD is None:
            self._outputs_STD = empty_samples(self.hidden_STD.shape, self.folder)
        for sample, hidden_TD in enumerate(self.hidden_STD):
            self._outputs_STD[sample] = self._run_block(block, hidden_TD)
        return self._outputs_STD

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Run a batch of samples through a block, with gradients where they are enabled: [B, T, D] to [B, T, D]."""
        return self._call(block, hidden_BTD, self._arguments[0])

    def _call(self, block: nn.Module, hidden_BTD: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run a batch through a block with given arguments."""
        with fast_float32_products():
            result = block(hidden_BTD.to(self.device), **arguments)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output.reshape(hidden_BTD.shape)

    def runner(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """Return `run` for the block that is next now, to be used when later ones have been reached."""
        arguments = self._arguments[0]
        return lambda block, hidden_BTD: self._call(block, hidden_BTD, arguments)

    def _run_block(self, block: nn.Module, hidden_TD: Tensor) -> Tensor:
        """Run one sample through a block: [T, D] to [T, D]."""
        return self.run(block, hidden_TD[None])[0]

    @torch.no_grad()
    def _run_outer(self, original: OriginalModel) -> Tensor:
        """Run everything before the first block on all samples, noting every block's arguments."""
        blocks = original.blocks
        real = list(blocks)
        noting = [_NotingBlock(block) for block in real]
        hidden_size: int = original.config.get_text_config().hidden_size
        hidden_STD = empty_samples((*self.ids_ST.shape, hidden_size), self.folder)
        sample_of_run = iter(hidden_STD)

        def remember(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            del module
            next(sample_of_run).copy_(arguments[0][0])

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
        return hidden_STD


@contextmanager
def _hooked(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Watch a module's inputs; the hook always comes off."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

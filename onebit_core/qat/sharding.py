"""Latents and the original spread over processes (FSDP2): each keeps a share, and a block is whole only while it runs.

    forward    a block's latents are gathered, the block runs, what others keep is forgotten
    backward   they are gathered again; gradients are added up, and each process keeps those of its share
    a step     on one's own share: latents, moments, the best so far

What lies outside of the blocks, norms, and what a latent has beside its parameters (salient weights, scales) is whole
in every process.

Source: torch's fully_shard (FSDP2; arXiv:2304.11277 describes the first).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onebit_core.errors import ConfigError
from onebit_core.model.experts import LinearExperts
from onebit_core.model.loading import open_original

if TYPE_CHECKING:  # not every build of torch has them
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


class ShardedBlock(nn.Module):
    """Stands in the place of a block whose latents are spread; attributes that models ask for are the block's."""

    def __init__(self, block: nn.Module, trained: Iterable[nn.Parameter], mesh: "DeviceMesh") -> None:
        """Spread parameters over the processes of a mesh.

        Args:
            block: a decoder block on the mesh's device; its other parameters stay whole.
            trained: which of its parameters.
            mesh: of one dimension.

        Raises:
            ConfigError: a mixture of experts, with a torch that cannot do this.
        """
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.block = block
        spread = {id(value) for value in trained}
        sharded: Any = fully_shard(
            self,
            mesh=mesh,
            reshard_after_forward=True,
            shard_placement_fn=partial(_place, processes=mesh.size()),
            ignored_params={value for value in block.parameters() if id(value) not in spread},
        )
        sharded.set_gradient_divide_factor(1.0)  # losses are shares of the whole batch's already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
        if hasattr(sharded, "set_reduce_scatter_unused_params"):  # experts that only some processes' tokens reach
            sharded.set_reduce_scatter_unused_params(True)
        elif any(isinstance(module, LinearExperts) for module in block.modules()):
            raise ConfigError(
                f"training.shard: torch {torch.__version__} cannot spread a mixture of experts; "
                "update torch, or leave training.shard out"
            )

    def __getattr__(self, name: str) -> Any:
        """Return the block's where this has no such attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":
                raise
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        return self.block(*args, **kwargs)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the parameters for a while; all processes together."""
        sharded: Any = self
        sharded.unshard()
        try:
            yield
        finally:
            sharded.reshard()


def _place(value: nn.Parameter, processes: int) -> "Shard":
    """Say along which dimension a parameter is cut: the first that all get the same of, else unevenly the first."""
    from torch.distributed.tensor import Shard

    even = (dimension for dimension, size in enumerate(value.shape) if size % processes == 0)
    return Shard(next(even, 0))


def load_sharded(name: str, mesh: "DeviceMesh", device: str, dtype: torch.dtype, *, eight_bit: bool) -> PreTrainedModel:
    """Load an original, dense, in eval mode, block by block: each process keeps a share of every block.

    Args:
        name: of the original.
        mesh: processes.
        device: this process's.
        dtype: of the weights.
        eight_bit: whether linears are put into 8 bit (onebit_core.qat.teacher).
    """
    from torch.distributed.fsdp import fully_shard

    from onebit_core.qat.teacher import block_to_eight_bit

    original = open_original(name)
    for index in range(len(original.blocks)):
        block = original.load_block(index, "cpu").to(dtype)
        if eight_bit:
            block_to_eight_bit(block)
        fully_shard(block.to(device), mesh=mesh, reshard_after_forward=True)
    original.load_outer(device)
    for _, value in original.outer_parameters(head=True):
        value.data = value.data.to(dtype)
    return original.model


def own_part(value: Tensor) -> Tensor:
    """Return what this process keeps of a tensor that is spread, and all of one that is not."""
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor, which every process asks for if it is spread."""
    gathered: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return gathered

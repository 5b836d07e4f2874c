"""Several processes that train one model together: each has all of it, and a share of every step's windows.

    process r of n   runs the windows r, r + n, r + 2n, ... of a batch
    all              add up their gradients, so that each takes the step that one process would take on the whole batch
    the first        reports, keeps checkpoints and writes the artifact

torchrun starts them and tells them of each other; without it there is one. What must be decided together, such as a
stop, is asked of all: a process that left alone would leave the others waiting.
"""

import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onebit_core.errors import ConfigError
from onebit_core.qat.sharding import own_part

if TYPE_CHECKING:  # not every build of torch has them
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
BETWEEN_QUESTIONS_SECONDS = 0.02
LONGEST_WAIT = timedelta(days=1)
"""For the others: the first process alone lets the original write text, which may take hours."""


@contextmanager
def joined() -> Iterator["World"]:
    """Join the other processes that torchrun has started, until the end of the block; alone where it has not."""
    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        yield World()
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=unused_part(store, rank, size), rank=rank, world_size=size, timeout=LONGEST_WAIT
    )
    try:
        yield World()
    finally:
        dist.destroy_process_group()


def unused_part(store: "Store", rank: int, size: int) -> "Store":
    """Return a part of torchrun's store that no earlier attempt has written into; all processes get the same.

    After a restart torchrun may hand out the store of the attempt that died, with the addresses of its processes, and
    its count of restarts is not the same on every machine (pytorch issues 135712 and 167288). So every process writes
    a new name for itself, the first proposes the names that it reads, again while any of them is an old one, and when
    all have found their own in one proposal, that is the name of the part.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    name = uuid4().hex
    if rank == 0:
        store.set("agreed", "")
    store.set(f"found/{rank}", "")
    store.set(f"name/{rank}", name)  # last: who reads it may read the others
    agreed = ""
    while name not in agreed:
        time.sleep(BETWEEN_QUESTIONS_SECONDS)
        if rank == 0:
            proposed = ",".join(store.get(f"name/{other}").decode() for other in range(size))
            store.set("proposed", proposed)
            if all(store.get(f"found/{other}").decode() == proposed for other in range(1, size)):
                store.set("agreed", proposed)
        elif name in (proposed := store.get("proposed").decode()):
            store.set(f"found/{rank}", proposed)
        agreed = store.get("agreed").decode()
    return PrefixStore(agreed, store)


class World:
    """The processes of this training; made anew wherever it is needed.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        is_joined = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if is_joined else (0, 1)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def device(self, device: str) -> str:
        """Return this process's own device where a kind is named: cuda becomes cuda:1 for the second of a machine.

        Raises:
            ConfigError: the machine has fewer GPUs than processes.
        """
        if self.size == 1 or not device.startswith("cuda"):
            return device
        place = dist.get_node_local_rank() if device == "cuda" else torch.device(device).index
        if place >= torch.cuda.device_count():
            raise ConfigError(
                f"device {device}: process {place + 1} of this machine has no GPU, of {torch.cuda.device_count()}; "
                f"start at most {torch.cuda.device_count()} (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(place)
        return f"cuda:{place}"

    def on_this_machine(self) -> int:
        """Return how many of the processes run here; all ask together."""
        if self.size == 1:
            return 1
        names: list[str] = [""] * self.size
        dist.all_gather_object(names, socket.gethostname())
        return names.count(socket.gethostname())

    def share(self, windows_BT: Tensor) -> Tensor:
        """Return this process's windows of a batch; none, if there are fewer windows than processes."""
        return windows_BT[self.rank :: self.size]

    def total(self, *values: float) -> tuple[float, ...]:
        """Return sums over all processes, the same for all."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def any(self, is_so: bool) -> bool:  # noqa: FBT001  (the question's only argument)
        """Say whether it is so for any of them."""
        return self.total(float(is_so))[0] > 0

    def from_first(self, make: Callable[[], T]) -> T:
        """Let the first process make something, and give it to all."""
        made = [make() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(made)
        return cast("T", made[0])

    def mesh(self, device: str) -> "DeviceMesh":
        """Return all processes as what a model can be spread over; all ask together."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(torch.device(device).type, (self.size,))

    def among_largest(self, own_N: Tensor, count: int) -> Tensor:
        """Say of this process's values which are among the `count` largest of all processes': bool [N]."""
        best = own_N.topk(min(count, len(own_N)))
        sent_C = own_N.new_full((count,), -torch.inf)
        sent_C[: len(best.values)] = best.values
        received_RC = [torch.empty_like(sent_C) for _ in range(self.size)]
        dist.all_gather(received_RC, sent_C)
        order = torch.cat(received_RC).sort(descending=True, stable=True).indices[:count]
        is_chosen_RC = torch.zeros(self.size * count, dtype=torch.bool, device=own_N.device)
        is_chosen_RC[order] = True
        chosen_N = torch.zeros_like(own_N, dtype=torch.bool)
        chosen_N[best.indices] = is_chosen_RC.view(self.size, count)[self.rank, : len(best.indices)]
        return chosen_N

    def drop_unreached(self, values: Iterable[nn.Parameter]) -> None:
        """Take gradients away that are zero in all processes' parts: of an expert that no token has reached."""
        ordered = [value for value in values if value.grad is not None]
        seen = torch.tensor([float(own_part(cast("Tensor", value.grad)).any()) for value in ordered])
        dist.all_reduce(seen)
        for value, number in zip(ordered, seen.tolist(), strict=True):
            if not number:
                value.grad = None

    def add_gradients(self, values: Iterable[nn.Parameter]) -> None:
        """Give every parameter the sum of all processes' gradients; one that nobody has a gradient of keeps none."""
        if self.size == 1:
            return
        ordered = list(values)
        seen = torch.tensor([float(value.grad is not None) for value in ordered])
        dist.all_reduce(seen)
        for value, number in zip(ordered, seen.tolist(), strict=True):
            if number:
                if value.grad is None:
                    value.grad = torch.zeros_like(value)
                dist.all_reduce(value.grad)

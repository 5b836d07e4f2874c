"""Run by torchrun: every process does what a file says, one of several that do it together, and says what came of it.

[{"do": "train", "config": {...}, "out": "...", "work": "..."}, {"do": "parts", ...}, ...]
answers in FILE.RANK, in the same order; {rank} in a path becomes the process's number
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onebit_core.errors import OnebitError
from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
from onebit_core.qat import joined
from onebit_core.qat.bop import among_largest
from onebit_core.qat.sharding import ShardedBlock, load_sharded, own_part
from onebit_core.qat.world import World


def train(config: dict[str, Any], out: str, work: str | None = None) -> str:
    place = Path(work.format(rank=World().rank)) if work else None
    return str(train_artifact(TrainArtifactConfig.from_dict(config), Path(out), work=place))


def parts(model: str) -> dict[str, int]:
    """Return how many weights of an original's blocks this process keeps, and how many there are."""
    blocks = load_sharded(model, World().mesh("cpu"), "cpu", torch.float32, eight_bit=False).base_model.layers
    weights = [value for block in blocks for value in block.parameters()]
    return {"own": sum(own_part(value).numel() for value in weights), "all": sum(value.numel() for value in weights)}


class Scaled(nn.Module):
    """As a block: a matrix that is trained, and a factor that is not."""

    kind = "scaled"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(24.0).view(4, 6))
        self.factor = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.factor) @ self.weight.T


def block() -> dict[str, Any]:
    """Spread one block, and say what it shows of itself, and its gradient when every process gives it its number."""
    real = Scaled()
    spread = ShardedBlock(real, [real.weight], World().mesh("cpu"))
    spread(torch.full((1, 6), World().rank + 1.0)).sum().backward()
    with spread.whole():
        seen = real.weight.tolist()
    gradient = real.weight.grad.full_tensor()
    return {"kind": spread.kind, "whole": seen, "gradient": gradient.tolist(), "factor": len(real.factor)}


def largest(count: int) -> list[list[bool]]:
    """Return which of this process's of 30 numbers are chosen, and which are if one process has all; some are equal."""
    world = World()
    numbers = torch.randint(0, 9, (30,), generator=torch.Generator().manual_seed(0)).float()
    own = numbers.tensor_split(world.size)[world.rank]
    return [
        world.among_largest(own, count).tolist(),
        own.tolist(),
        sorted(numbers[among_largest(numbers, count)].tolist()),
    ]


def unreached() -> list[bool]:
    """Return whether gradients are dropped: one that the second process has, and one that is zero in all."""
    world = World()
    values = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    for value in values:
        value.grad = torch.zeros(2)
    values[0].grad[1] = float(world.rank == 1)
    world.drop_unreached(values)
    return [value.grad is None for value in values]


def device(name: str) -> str:
    return World().device(name)


TASKS: dict[str, Callable[..., Any]] = {
    "train": train,
    "parts": parts,
    "block": block,
    "largest": largest,
    "unreached": unreached,
    "device": device,
}


def main() -> None:
    file = Path(sys.argv[1])
    answers = []
    with joined() as world:
        for task in json.loads(file.read_text()):
            try:
                answers.append(TASKS[task.pop("do")](**task))
            except OnebitError as error:
                answers.append(f"{type(error).__name__}: {error}")
        Path(f"{file}.{world.rank}").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()

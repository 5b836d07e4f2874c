"""How processes find each other in a store that an attempt before them may have left."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from onebit_core.qat.world import unused_part

SIZE = 3


def attempt(port: int, first: int) -> list[str]:
    """Let every process of one attempt write its rank into its part, the one of rank `first` before the others."""

    def join(rank: int) -> str:
        store = dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=timedelta(seconds=20))
        part = unused_part(store, rank, SIZE)
        assert part.add("joined", 1) <= SIZE, "an earlier attempt has written here"
        assert not part.check([f"rank/{rank}"])
        part.set(f"rank/{rank}", str(rank))
        return "".join(part.get(f"rank/{other}").decode() for other in range(SIZE))

    with ThreadPoolExecutor(SIZE) as pool:
        joins = [pool.submit(join, (first + rank) % SIZE) for rank in range(SIZE)]
        return [each.result(timeout=30) for each in joins]


def test_every_attempt_has_a_part_of_its_own():
    """In one store, whoever comes first: what the attempts before have left is not read."""
    server = dist.TCPStore("127.0.0.1", 0, None, is_master=True, timeout=timedelta(seconds=20), wait_for_workers=False)
    for first in (0, 1, 2, 1, 0):
        assert attempt(server.port, first) == ["012"] * SIZE

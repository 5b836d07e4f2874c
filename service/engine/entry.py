"""The engine process's first line. It imports nothing large, so that the server, which names it, need not either.

The server computes no tensors: without torch it answers its first probe a few seconds earlier, and the engine, which
takes those seconds for its own imports, is started that much sooner.
"""

from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from service.engine.types import EngineConfig

if TYPE_CHECKING:
    from service.engine.messages import FromEngine, ToEngine


def run_engine(connection: "Connection[FromEngine, ToEngine]", config: EngineConfig, parent_pid: int) -> None:
    """Run an engine until told to stop; the target of the engine process."""
    from service.engine import process

    process.main(connection, config, parent_pid)

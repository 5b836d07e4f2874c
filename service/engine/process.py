"""What runs in the engine process: load the model, report, and hand over to the loop.

    main -> ignore signals, die with the parent -> load -> Started or StartFailed -> EngineLoop.run
    a reader thread moves messages from the pipe to the loop's inbox, so the server never waits for a step

The process is the server's and only the server's: it ignores SIGINT and SIGTERM, because a terminal or a supervisor
sends them to the whole group and the server wants to drain first; and it never outlives the server: the kernel kills
it when its parent dies (PR_SET_PDEATHSIG, Linux), and the end of the pipe does the same anywhere.
"""

import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from onebit_core.adapters.identity import read_adapter_info
from onebit_core.adapters.scales import AdapterSwitch, read_scales
from onebit_core.errors import OnebitError
from onebit_core.layers import release_stored
from service.engine.detokenizer import Decode
from service.engine.grammar import GrammarCompiler
from service.engine.grammar_desk import Compiled
from service.engine.loop import EngineLoop
from service.engine.messages import FromEngine, Started, StartFailed, ToEngine
from service.engine.runner import Runner
from service.engine.steady import fingerprint, own_weights, stamp
from service.engine.types import EngineConfig, EngineInfo
from service.errors import EngineStartFailed
from service.log import adopt_logger, configure_logging

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
EXIT_START_FAILED = 3
EXIT_PARENT_GONE = 4


class Loaded(Protocol):
    """What a loader returns; `onebit_core.artifact.reader.LoadedModel` is one."""

    @property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode and on its device."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""


def main(connection: "Connection[FromEngine, ToEngine]", config: EngineConfig, parent_pid: int) -> None:
    """Run an engine over `connection` until told to stop; the target of the engine process."""
    belong_to(parent_pid)
    configure_logging(config.log_level)
    adopt_logger("transformers")
    transformers_logging.disable_progress_bar()
    inbox: SimpleQueue[ToEngine | Compiled] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), name="engine-inbox", daemon=True).start()
    try:
        runner, tokenizer = load(config)
    except (OnebitError, EngineStartFailed, OSError, ValueError, RuntimeError, ImportError, MemoryError) as error:
        log.exception("loading %s failed", config.artifact)
        connection.send(StartFailed(message=str(error) or type(error).__name__))
        sys.exit(EXIT_START_FAILED)
    info = describe(runner, tokenizer)
    connection.send(Started(info=info))
    loop = EngineLoop(
        runner=runner,
        decode=decoder(tokenizer),
        compile_grammar=grammar_compiler(tokenizer, info).compile,
        eos_token_ids=info.eos_token_ids,
        config=config,
        inbox=inbox,
        publish=connection.send,
    )
    gc.freeze()  # the model's objects live as long as the process; later collections need not look at them
    loop.run()
    gc.unfreeze()  # else Triton, whose objects were never let go, writes leaks into the log at exit


def load(config: EngineConfig) -> tuple[Runner, PreTrainedTokenizerBase]:
    """Load the artifact with the configured loader and put a runner around it.

    Raises:
        EngineStartFailed: the model cannot be served with this configuration.
        OnebitError: the artifact cannot be loaded.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module, _, function = config.loader.partition(":")
    loader = getattr(importlib.import_module(module), function)
    before = _stamp_of(config)
    loaded: Loaded = loader(config.artifact, device=device, dtype=config.dtype, backend=config.backend)
    release_stored(loaded.model)  # a server only computes; the packed copy is enough
    own_weights(loaded.model)
    if _stamp_of(config) != before:
        raise EngineStartFailed(f"{config.artifact} was changed while it was loaded; load it again")
    return Runner(loaded.model, config, _adapters(loaded.model, config)), loaded.tokenizer


def _adapters(model: PreTrainedModel, config: EngineConfig) -> AdapterSwitch | None:
    """Read the adapters that requests may name.

    Raises:
        ArtifactError: one is damaged, or not for this model.
        EngineStartFailed: one is another than the server knows.
    """
    if not config.adapters:
        return None
    switch = AdapterSwitch(model, model.device)
    for name, folder, known in config.adapters:
        info = read_adapter_info(folder)
        if info.sha256 != known:
            raise EngineStartFailed(
                f"adapter {name}: {folder} is not what it was when the server read it; load {config.artifact} again, "
                "or swap it in under the same name"
            )
        switch.add(name, read_scales(folder, info))
    return switch


def _stamp_of(config: EngineConfig) -> object:
    """Return what the model's files are now.

    Raises:
        EngineStartFailed: they are not those that the server knows.
    """
    folder = Path(config.artifact)
    if config.fingerprint and fingerprint(folder) != config.fingerprint:
        raise EngineStartFailed(
            f"{config.artifact} is not what it was when the server read it: its files were changed, replaced or "
            "deleted; load it again, or swap it in under the same name"
        )
    return stamp(folder)


def describe(runner: Runner, tokenizer: PreTrainedTokenizerBase) -> EngineInfo:
    """Say what was loaded."""
    return EngineInfo(
        max_model_len=runner.capacity.max_model_len,
        vocab_size=runner.vocab_size,
        num_pages=runner.capacity.num_pages,
        eos_token_ids=_eos_token_ids(runner.eos_token_ids, tokenizer),
        device=runner.device.type,
        dtype=str(runner.dtype).removeprefix("torch."),
        backend=runner.backend,
        memory_bytes=runner.num_bytes,
        embedding_size=runner.embedding_size,
        notes=runner.capacity.notes,
    )


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Return the tokenizer's decoding without special tokens; straight to its Rust part where it has one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: str(backend.decode(ids, skip_special_tokens=True))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def grammar_compiler(tokenizer: PreTrainedTokenizerBase, info: EngineInfo) -> GrammarCompiler:
    """Return who compiles grammars for this model's tokens."""
    return GrammarCompiler(tokenizer, vocab_size=info.vocab_size, end_token_ids=info.eos_token_ids)


def _eos_token_ids(of_model: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ends of the model's generation_config and of the tokenizer."""
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*of_model, *of_tokenizer}))


def belong_to(parent_pid: int) -> None:
    """Ignore the group's signals, and die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before we asked to be told
            os._exit(EXIT_PARENT_GONE)


def _read(connection: "Connection[FromEngine, ToEngine]", inbox: SimpleQueue[ToEngine | Compiled]) -> None:
    """Move messages to the inbox until the pipe ends; then the server is gone, and so are we."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(EXIT_PARENT_GONE)
        inbox.put(message)

"""A loader for the engine that reads a plain Hugging Face folder, as `EngineConfig.loader` names it.

The engine's own loader reads artifacts; this one lets tests compare with `generate()` of the same dense model.
"""

import os
import signal
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

PLAIN_LOADER = "tests.support.plain_loader:load_plain"
TRAP_LOADER = "tests.support.plain_loader:load_with_traps"
KILLED_LOADER = "tests.support.plain_loader:load_killed"

NAN_TOKEN = 300  # its embedding is NaN
FAILING_TOKEN = 301  # a forward that sees it raises
KILLING_TOKEN = 302  # a forward that sees it is killed, as if memory had run out


@dataclass(frozen=True, kw_only=True)
class PlainModel:
    """A dense model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_plain(path: str, *, device: str = "cpu", dtype: str = "auto", backend: str = "auto") -> PlainModel:
    """Load a folder that `save_pretrained` wrote; `backend` has no meaning for dense weights."""
    logging.disable_progress_bar()
    resolved = {"auto": torch.float32 if device == "cpu" else torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=resolved, local_files_only=True).to(device).eval()
    model.requires_grad_(False)
    return PlainModel(model=model, tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True))


def load_with_traps(path: str, *, device: str, dtype: str, backend: str) -> PlainModel:
    """Load a folder with an untied head, and set a trap under three tokens."""
    plain = load_plain(path, device=device, dtype=dtype, backend=backend)
    embedding = plain.model.get_input_embeddings()
    assert embedding.weight is not plain.model.get_output_embeddings().weight, "a tied head would spread the NaN"
    embedding.weight[NAN_TOKEN] = float("nan")

    def spring(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        (ids,) = arguments
        if (ids == FAILING_TOKEN).any():
            raise RuntimeError("the failing token was computed")
        if (ids == KILLING_TOKEN).any():
            os.kill(os.getpid(), signal.SIGKILL)

    embedding.register_forward_pre_hook(spring)
    return plain


def load_killed(path: str, *, device: str, dtype: str, backend: str) -> PlainModel:
    """Die without a word, as a process does that the system kills for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")

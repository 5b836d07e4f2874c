"""The engine's loader of originals: a Hugging Face folder with dense weights, for comparison with what was made of it.

Everything else is the engine's own way: the same paged cache, scheduler and sampling, so that what differs between an
artifact and its original is the weights. On the CPU activations are float32 as an artifact's are: one sequence decodes
as fast as in bfloat16 and prompts are read faster (docs/models.md), at twice the memory.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onebit_core.artifact.reader import resolve_dtype
from onebit_core.errors import NotEnoughMemory
from onebit_core.model.loading import load_original
from onebit_core.model.weights import WeightStore


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """An original in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_dense(path: str, *, device: str = "cpu", dtype: str = "auto", backend: str = "auto") -> DenseModel:
    """Load an original.

    Args:
        path: its folder.
        device: cpu or cuda.
        dtype: as for an artifact.
        backend: of packed layers, of which there are none.

    Raises:
        NotEnoughMemory: the machine has too little free memory.
        UnsupportedModel: transformers cannot load it.
        ConfigError: unknown dtype.
    """
    del backend
    torch_dtype = resolve_dtype(dtype, device)
    needed = WeightStore(Path(path)).num_parameters() * torch_dtype.itemsize
    free = psutil.virtual_memory().available
    if device == "cpu" and needed > free:
        raise NotEnoughMemory(
            f"{path} needs {needed / 2**30:.1f} GiB of memory in {str(torch_dtype).removeprefix('torch.')}, and "
            f"{free / 2**30:.1f} GiB are free; use --dtype bfloat16, or take a machine with more memory"
        )
    model, tokenizer = load_original(path, device=device, dtype=torch_dtype)
    return DenseModel(model=model, tokenizer=tokenizer)

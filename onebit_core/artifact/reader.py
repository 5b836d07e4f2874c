"""load_model(): the front door to an artifact. It refuses whatever is missing, unexpected or misshapen.

Before a byte of weights is used, the tensors that config.json promises (names, shapes, dtypes follow from the layer
specs) are compared with the headers of the weight files, and the files with the manifest's hash. Only then transformers
loads it through the registered quantizer. No method code is imported: an artifact does not need what made it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from onebit_core.artifact.golden import read_golden
from onebit_core.artifact.identity import read_manifest, read_report
from onebit_core.artifact.manifest import MOST_PACKED_PER_STORED, Manifest
from onebit_core.artifact.registration import QUANT_METHOD, OnebitQuantizationConfig, swap_modules
from onebit_core.artifact.weight_files import read_headers, weight_files, weights_sha256
from onebit_core.errors import (
    ArtifactError,
    ConfigError,
    CorruptArtifact,
    NotEnoughMemory,
    UnsupportedFormat,
    first_line,
)
from onebit_core.kernels import Backend, describe_backend, resolve_backend, resolve_device
from onebit_core.layers import SalientPart, SplitLinear, pack_layers, use_backend
from onebit_core.model.blocks import shared_inputs
from onebit_core.model.loading import build_skeleton, read_tokenizer

__all__ = [
    "LoadedModel",
    "check_tensors",
    "empty_model",
    "load_model",
    "read_manifest",
    "read_report",
    "resolve_dtype",
    "weights_sha256",
]

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATING_DTYPES = ("F64", "F32", "F16", "BF16")
SAFETENSORS_DTYPES = {torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """An artifact in memory.

    Attributes:
        model: transformers' model with packed layers, in eval mode, without gradients.
        tokenizer: its tokenizer.
        manifest: what it says about itself.
        path: its folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest
    path: Path


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: str = "auto", backend: str = "auto", verify: bool = True
) -> LoadedModel:
    """Load an artifact.

    Args:
        path: its folder.
        device: auto, cpu, cuda or cuda:N.
        dtype: of activations: float32, bfloat16, float16; auto is float32 on the CPU and bfloat16 elsewhere.
        backend: see onebit_core.kernels.backends.
        verify: compare weights and golden prompts with the manifest's hashes.

    Raises:
        ArtifactError: not an artifact, of a newer version, or damaged.
        NotEnoughMemory: the machine has too little free memory.
        BackendUnavailable: no such backend or device here, or not both together.
        ConfigError: unknown dtype.
    """
    folder = Path(path)
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    chosen = resolve_backend(backend, device)
    manifest = read_manifest(folder)
    check_tensors(folder)
    if verify and weights_sha256(folder) != manifest.sha256:
        raise CorruptArtifact(
            f"{weight_files(folder)[0]}: the hash is not the manifest's; the file was damaged or changed"
        )
    if verify:
        read_golden(folder, manifest)
    if device == "cpu":
        _check_memory(manifest, torch_dtype, chosen)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype, trust_remote_code=False, use_safetensors=True
    )
    model.eval()
    model.requires_grad_(requires_grad=False)
    _check_indices(model, folder)
    use_backend(model, chosen)
    model.to(device=device)
    pack_layers(model, shared_inputs(model))
    _log.info("%s: backend %s on %s", manifest.name, describe_backend(chosen), device)
    return LoadedModel(model=model, tokenizer=read_tokenizer(folder), manifest=manifest, path=folder)


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Return the activation dtype of a user's choice.

    Raises:
        ConfigError: unknown name.
    """
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_tensors(folder: Path) -> None:
    """Compare the tensors on disk with those config.json promises.

    Raises:
        ArtifactError: naming the first tensor that is missing, unexpected, or of another shape or dtype.
    """
    expected = _expected_tensors(folder)
    shapes = read_headers(folder)
    weights = weight_files(folder)[0] if len(weight_files(folder)) == 1 else folder
    for name in sorted(set(expected) | set(shapes)):
        if name not in shapes:
            raise CorruptArtifact(f"{weights}: tensor {name!r} is missing")
        if name not in expected:
            raise CorruptArtifact(f"{weights}: tensor {name!r} is unexpected")
        shape, dtype = shapes[name]
        wanted_shape, wanted_dtype = expected[name]
        if shape != wanted_shape or dtype not in (FLOATING_DTYPES if wanted_dtype is None else (wanted_dtype,)):
            wanted = f"{wanted_dtype or 'floating'} {list(wanted_shape)}"
            raise CorruptArtifact(f"{weights}: tensor {name!r} is {dtype} {list(shape)}, expected {wanted}")


def empty_model(folder: Path) -> PreTrainedModel:
    """Return the model that an artifact describes, with packed layers that take no memory and have no values.

    Raises:
        ArtifactError: its configuration is not an artifact's, or of a newer version.
        NotEnoughMemory: see build_skeleton.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CorruptArtifact(f"{folder}: config.json cannot be used ({first_line(error)})") from error
    values = getattr(config, "quantization_config", None)
    if isinstance(values, OnebitQuantizationConfig):
        values = values.to_dict()
    if not isinstance(values, dict) or values.get("quant_method") != QUANT_METHOD:
        raise UnsupportedFormat(f"{folder}: config.json has no quantization_config of method {QUANT_METHOD!r}")
    try:
        model = build_skeleton(config)
        swap_modules(model, OnebitQuantizationConfig(**values))
    except (ArtifactError, NotEnoughMemory):
        raise
    except Exception as error:
        raise CorruptArtifact(f"{folder}: config.json: {first_line(error)}") from error
    return model


def _expected_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """Return name to (shape, dtype on disk; None where any floating dtype will do)."""
    model = empty_model(folder)
    tied = set(model.all_tied_weights_keys)
    parameters = dict(model.named_parameters())
    return {
        name: (tuple(tensor.shape), None if name in parameters else SAFETENSORS_DTYPES.get(tensor.dtype))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _check_indices(model: PreTrainedModel, folder: Path) -> None:
    """Refuse salient places outside of their matrix, and columns that do not fit the parts of a split layer."""
    for name, module in model.named_modules():
        if isinstance(module, SalientPart | SplitLinear):
            try:
                module.check()
            except CorruptArtifact as error:
                raise CorruptArtifact(f"{folder}: {name}: {error}") from error


def _check_memory(manifest: Manifest, dtype: torch.dtype, backend: Backend) -> None:
    """Refuse a model that will not fit: the stored weights, and the backend's own copy of them."""
    stored = sum(manifest.bytes_by_part.values())
    packed = MOST_PACKED_PER_STORED * stored if backend != "reference" else stored
    needed = stored + (manifest.source.parameters * dtype.itemsize if backend == "dense" else packed)
    free = psutil.virtual_memory().available
    if needed > free:
        remedy = "use a packed backend or a smaller dtype" if backend == "dense" else "free some of it"
        raise NotEnoughMemory(
            f"{manifest.name} needs {needed / 2**30:.1f} GiB of memory with backend {backend}, and "
            f"{free / 2**30:.1f} GiB are free; {remedy}, or take a machine with more memory"
        )

"""Writes an artifact: into a temporary folder beside the target, reads it back, renames. Nothing half-written remains.

Whatever is not quantized is copied from the original's files in its own dtype, bit for bit.
"""

import dataclasses
import datetime
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

import onebit_core
from onebit_core.artifact.golden import GoldenPrompts, write_golden
from onebit_core.artifact.golden_answers import COMPLETION_TOKENS, compute_golden
from onebit_core.artifact.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    PARTS,
    REPORT_FILE,
    BitsInfo,
    Manifest,
    Report,
    SourceInfo,
)
from onebit_core.artifact.reader import check_tensors, load_model
from onebit_core.artifact.registration import OnebitQuantizationConfig, swap_embedding, ties_embedding
from onebit_core.artifact.weight_files import save_weights, stored_tensors, weights_sha256
from onebit_core.config import StrictConfig
from onebit_core.errors import ArtifactError, CorruptArtifact, NotEnoughMemory, first_line
from onebit_core.layers import EMBEDDINGS, QuantizedLinear, quantize_table
from onebit_core.model.loading import OriginalModel

_log = logging.getLogger(__name__)

LARGEST_DENSE_BYTES = 4 << 30
"""A model whose dense weights take less, and at most a quarter of what is free, is unpacked for its golden prompts."""

FEW_TOKENS = 4
"""How far a larger one continues them: it stays packed, and is unpacked layer by layer at every step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArtifactDraft:
    """What a finished quantization hands to the writer.

    Attributes:
        name: model name.
        method: name of the method.
        settings: its complete settings.
        nominal_bits: what the method's paper would advertise.
        calibration: as it goes into the manifest.
        reconstruction: as it goes into the manifest.
        training: likewise.
        allocation: likewise.
        rotation: likewise.
        embedding_bits: 4, 8 or 16.
        layers: module path to packed layer.
        report: measured while quantizing.
    """

    name: str
    method: str
    settings: dict[str, Any]
    nominal_bits: float
    calibration: dict[str, Any]
    reconstruction: dict[str, Any]
    training: dict[str, Any]
    allocation: dict[str, Any]
    rotation: str
    embedding_bits: int
    layers: Mapping[str, QuantizedLinear]
    report: Report


def write_artifact(original: OriginalModel, draft: ArtifactDraft, out: Path) -> Manifest:
    """Write an artifact.

    Args:
        original: the model it was made from, with `draft.layers` in place.
        draft: the rest.
        out: the folder to make; must not exist.

    Raises:
        ArtifactError: the folder exists, the disk is full, or what was written does not read back.
    """
    refuse_existing(out)
    return _add_golden(out, _write_whole(original, draft, out))


def _write_whole(original: OriginalModel, draft: ArtifactDraft, out: Path) -> Manifest:
    """Write everything that the artifact cannot do without."""
    with temporary_folder(out) as folder:
        stored = dict(draft.layers)
        tensors, parts = _collect(original, draft, stored)
        save_weights(folder, tensors)
        _write_config(original, draft, stored, folder)
        manifest = _manifest(original, draft, parts, folder)
        write_json(folder / MANIFEST_FILE, manifest)
        write_json(folder / REPORT_FILE, draft.report)
        _read_back(folder, tensors)
        folder.rename(out)
    return manifest


def refuse_existing(out: Path) -> None:
    """Refuse to overwrite.

    Raises:
        ArtifactError: something is there already.
    """
    if out.exists():
        raise ArtifactError(f"{out}: exists already; choose another --out, or remove it")


def update_report(path: str | Path, report: Report) -> None:
    """Replace an artifact's report.json at once.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    file = Path(path) / REPORT_FILE
    try:
        _replace_json(file, report)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be written ({error.strerror})") from error


def current_versions() -> dict[str, str]:
    """Return the versions that decide numbers."""
    return {
        "onebit": onebit_core.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def utc_now() -> str:
    """Return the current time, ISO 8601, UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _collect(
    original: OriginalModel, draft: ArtifactDraft, layers: dict[str, QuantizedLinear]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return all tensors to write, and bytes by part; an untied quantized head is added to `layers`."""
    tensors: dict[str, Tensor] = {}
    parts = dict.fromkeys(PARTS, 0)
    embedding_prefixes = _embedding_prefixes(original)
    if draft.embedding_bits < 16:
        for name, tensor in _quantize_embedding(original, draft.embedding_bits, layers):
            tensors[name] = tensor
            parts["embedding"] += tensor.nbytes
    for path, layer in layers.items():
        for name, part, stored in layer.stored_tensors():
            unquantized = name == "bias"
            tensor = original.store.tensor(original.stored_name(f"{path}.bias")) if unquantized else stored
            tensors[f"{path}.{name}"] = tensor.contiguous().cpu()
            parts["embedding" if path in embedding_prefixes else part] += tensor.nbytes
    tied = set(original.model.all_tied_weights_keys)
    done = (*(f"{path}." for path in layers),)
    for name, _ in original.model.named_parameters():
        if name in tied or name in tensors or name.startswith(done):
            continue
        tensor = original.store.tensor(original.stored_name(name))
        tensors[name] = tensor.contiguous()
        parts["embedding" if name.startswith(tuple(embedding_prefixes)) else "full_precision"] += tensor.nbytes
    return tensors, parts


def _embedding_prefixes(original: OriginalModel) -> list[str]:
    """Return the module paths of the embedding and the head."""
    ends = (original.model.get_input_embeddings(), original.model.get_output_embeddings())
    return [name for name, module in original.model.named_modules() if any(module is end for end in ends)]


def _quantize_embedding(
    original: OriginalModel, bits: int, layers: dict[str, QuantizedLinear]
) -> Iterator[tuple[str, Tensor]]:
    """Replace the embedding by its form of few bits and yield its tensors; an untied head becomes one of `layers`."""
    model = original.model
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    assert type(table) is nn.Embedding, "the plan refuses others"
    weight_VD = original.store.tensor(original.stored_name(f"{name}.weight"))
    if not ties_embedding(model):
        head = model.get_output_embeddings()
        head_name = next(path for path, module in model.named_modules() if module is head)
        layer = quantize_table(original.store.tensor(original.stored_name(f"{head_name}.weight")), bits)
        if head.bias is not None:
            layer.set_bias(torch.empty(layer.out_features))  # read from the original's file with the others
        layers[head_name] = layer
    swap_embedding(model, bits)
    filled = EMBEDDINGS[bits](*weight_VD.shape)
    filled.fill(weight_VD)
    for child, tensor in filled.state_dict().items():
        yield f"{name}.{child}", tensor


def _write_config(
    original: OriginalModel, draft: ArtifactDraft, layers: Mapping[str, QuantizedLinear], folder: Path
) -> None:
    """Write config.json, the tokenizer and the generation settings."""
    values = original.config_values()
    values["quantization_config"] = OnebitQuantizationConfig(
        layers={name: layer.spec.to_dict() for name, layer in layers.items()},
        embedding_bits=draft.embedding_bits,
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    original.tokenizer.save_pretrained(folder)
    generation = original.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)


def _manifest(original: OriginalModel, draft: ArtifactDraft, parts: dict[str, int], folder: Path) -> Manifest:
    """Describe what was written."""
    weights = sum(layer.in_features * layer.out_features for layer in draft.layers.values())
    stored = sum(layer.stored_bytes() for layer in draft.layers.values())
    parameters = original.num_parameters
    return Manifest(
        format_version=FORMAT_VERSION,
        name=draft.name,
        method=draft.method,
        settings=draft.settings,
        source=SourceInfo(
            model=original.name,
            sha256=original.store.sha256(),
            architecture=original.architecture,
            parameters=parameters,
        ),
        calibration=draft.calibration,
        reconstruction=draft.reconstruction,
        training=draft.training,
        allocation=draft.allocation,
        rotation=draft.rotation,
        versions=current_versions(),
        created=utc_now(),
        bits=BitsInfo(
            linear_true=round(8 * stored / weights, 4),
            linear_nominal=round(draft.nominal_bits, 4),
            whole_model=round(8 * sum(parts.values()) / parameters, 4),
        ),
        bytes_by_part=parts,
        sha256=weights_sha256(folder),
    )


def _read_back(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that the folder is a valid artifact and holds exactly what was meant."""
    check_tensors(folder)
    for name, tensor in stored_tensors(folder):
        if not torch.equal(tensor, tensors[name].cpu()):
            raise CorruptArtifact(f"{folder}: tensor {name!r} reads back differently; the disk may be faulty")


def _add_golden(folder: Path, manifest: Manifest) -> Manifest:
    """Load what was written, let it continue the golden prompts, and return the manifest that knows of them.

    The artifact is complete by now and stays so, whatever happens: golden.json counts once the manifest has its hash.
    """
    try:
        golden = _golden_of(folder, manifest)
        with_golden = dataclasses.replace(manifest, golden_sha256=write_golden(folder, golden))
        _replace_json(folder / MANIFEST_FILE, with_golden)
    except (NotEnoughMemory, OSError, RuntimeError, ValueError) as error:  # no reason to lose the work of hours
        _log.warning("%s: written without golden prompts (%s)", manifest.name, first_line(error))
        return manifest
    return with_golden


def _golden_of(folder: Path, manifest: Manifest) -> GoldenPrompts:
    """Compute the golden prompts on the CPU, in float32, without packed kernels."""
    dense_bytes = manifest.source.parameters * torch.float32.itemsize
    fits = dense_bytes <= min(LARGEST_DENSE_BYTES, psutil.virtual_memory().available // 4)
    backend, tokens = ("dense", COMPLETION_TOKENS) if fits else ("reference", FEW_TOKENS)
    loaded = load_model(folder, device="cpu", dtype="float32", backend=backend, verify=False)
    return compute_golden(loaded.model, loaded.tokenizer, backend=backend, tokens=tokens)


@contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """Make a folder beside `out` that disappears unless it was renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.writing-", dir=out.parent))
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be made ({error.strerror})") from error
    try:
        folder.chmod(0o755)
        yield folder
    except SafetensorError as error:  # how safetensors reports a full disk
        raise ArtifactError(f"{out}: cannot be written ({first_line(error)})") from error
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_json(file: Path, values: StrictConfig) -> None:
    """Replace one JSON file at once."""
    temporary = file.with_suffix(".writing")
    write_json(temporary, values)
    temporary.replace(file)


def write_json(file: Path, values: StrictConfig) -> None:
    """Write one JSON file and make sure it is on disk."""
    with file.open("w", encoding="utf-8") as stream:
        json.dump(values.to_dict(), stream, indent=1)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())

"""What an engine serves stays what it was, whatever happens to the files it was loaded from.

Weights are mapped into memory while they are loaded. A file that is deleted or replaced by renaming leaves a mapping as
it was; one that is overwritten in place changes under it, and one that is cut short ends the process. So what is still
mapped when the model is loaded is copied (`own_weights`): from then on the files do not matter.

They matter again when an engine that died is started anew. It must be the same model, or the server's tokenizer, names
and figures would belong to another one; so an engine is started with the `fingerprint` of the files and refuses others.
"""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from onebit_core.artifact.manifest import MANIFEST_FILE, REPORT_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
TEXT_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
MAPPED_FILE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* +(/.*)$", re.MULTILINE)


def fingerprint(folder: Path) -> str:
    """Return a hash of everything that decides what a model says.

    An artifact's weights are hashed in its manifest, and compared with it when they are loaded; of an original's there
    are only sizes and dates. The report is left out: it grows with each evaluation.
    """
    if not folder.is_dir():
        return ""
    is_artifact = (folder / MANIFEST_FILE).is_file()
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.suffix in WEIGHT_SUFFIXES:
            status = file.stat()
            digest.update(b"" if is_artifact else f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        elif file.suffix in TEXT_SUFFIXES and file.name != REPORT_FILE:
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def stamp(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return what changes when a file is written or replaced."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in WEIGHT_SUFFIXES)
    statuses = [(file.name, file.stat()) for file in files]
    return [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in statuses]


def own_weights(model: "PreTrainedModel") -> int:
    """Copy each parameter and buffer that is still mapped from a file; return how many bytes that were."""
    mapped = _mapped_ranges()
    copied = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_meta or tensor.device.type != "cpu":
            continue
        address = tensor.data_ptr()
        if mapped is None or any(start <= address < end for start, end in mapped):
            tensor.data = tensor.data.clone()
            copied += tensor.nbytes
    return copied


def _mapped_ranges() -> list[tuple[int, int]] | None:
    """Return where files of weights are mapped into this process; None where the system does not say."""
    try:
        text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    files = ((int(start, 16), int(end, 16), name) for start, end, name in MAPPED_FILE.findall(text))
    return [(start, end) for start, end, name in files if name.removesuffix(" (deleted)").endswith(WEIGHT_SUFFIXES)]

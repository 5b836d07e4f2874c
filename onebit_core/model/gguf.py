"""A GGUF file as a Hugging Face folder, converted once by transformers and kept in a cache.

The cache is ~/.cache/onebit/originals/<sha256 of the file>; tensors are bfloat16. Conversion dequantizes what the file
holds, so the "original" of a Q4_1 file is what Q4_1 left.

`python -m onebit_core.model.gguf FILE` converts in a process of its own, whose memory is gone afterwards, and prints
the folder.
"""

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from onebit_core.errors import ModelError, UnsupportedModel, first_line

GGUF_MAGIC = b"GGUF"


def convert_gguf(file: Path, cache: Path | None = None) -> Path:
    """Return a folder with the model of a GGUF file.

    Args:
        file: the GGUF file.
        cache: where converted models are kept; default ~/.cache/onebit/originals.

    Raises:
        UnsupportedModel: not a GGUF file, or one transformers cannot convert.
        ModelError: the file cannot be read, or the cache cannot be written.
    """
    folder = converted_folder(file, cache)
    cache = folder.parent
    if is_converted(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    except OSError as error:
        raise ModelError(f"{cache}: cannot hold the converted GGUF file ({error.strerror}); set HOME") from error
    try:
        _convert(file, temporary)
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def converted_folder(file: Path, cache: Path | None = None) -> Path:
    """Return where the model of a GGUF file is kept once it is converted.

    Raises:
        UnsupportedModel: not a GGUF file.
        ModelError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != GGUF_MAGIC:
                raise UnsupportedModel(f"{file}: does not start like a GGUF file")
        name = _sha256(file)[:32]
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    return (cache or Path.home() / ".cache" / "onebit" / "originals") / name


def is_converted(folder: Path) -> bool:
    """Whether a folder that `converted_folder` named is there; it appears complete."""
    return (folder / "config.json").is_file()


def _convert(file: Path, folder: Path) -> None:
    """Dequantize with transformers and save."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.bfloat16, **_dense()
        )
    except Exception as error:
        raise UnsupportedModel(f"{file}: transformers cannot convert it ({first_line(error)})") from error
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder.parent}: cannot hold the converted GGUF file ({first_line(error)})") from error


def _dense() -> dict[str, Any]:
    """Return the arguments that make transformers unpack the weights; older versions always do."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{convert_gguf(Path(sys.argv[1]))}\n")
    except ModelError as error:
        sys.exit(str(error))

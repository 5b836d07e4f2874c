"""`onebit write-text`: text that a model writes itself, as JSON lines to read, keep, or calibrate on elsewhere."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from onebit_core.cli.output import ProgressMode, print_event, progress_watch
from onebit_core.errors import ConfigError


def write_text(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, or GGUF file.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines file to write; must not exist.")],
    documents: Annotated[int, typer.Option(min=1, help="How many to write.")] = 32,
    tokens: Annotated[int, typer.Option(min=2, help="The most a document may have; a longer one is cut.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all choices.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")] = "auto",
    progress: Annotated[ProgressMode, typer.Option(help="How to show progress.")] = "auto",
) -> None:
    """Let MODEL write documents, one object with "text" a line.

    Example: onebit write-text ./SmolLM2 --out written.jsonl --documents 64 --tokens 1024
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; name another file, or remove it")
    from onebit_core.calibration.self_written import write_documents
    from onebit_core.kernels import resolve_device
    from onebit_core.model.loading import load_original, open_original
    from onebit_core.pipeline.calibrate import check_context, windows_at_once, writing_dtype

    where = resolve_device(device)
    with progress_watch(progress) as watch:
        opened = open_original(model)
        check_context(opened, tokens)
        at_once = windows_at_once(opened, documents, tokens, where)
        original, tokenizer = load_original(model, device=where, dtype=writing_dtype(where))
        texts = write_documents(
            original, tokenizer, documents=documents, tokens=tokens, seed=seed, at_once=at_once, watch=watch
        )
        _save(texts, out)
    if progress == "json":
        print_event("result", file=str(out), documents=documents)
    else:
        print(f"{documents} documents written to {out}")


def _save(texts: Iterable[str], out: Path) -> None:
    """Write the file beside its place, and move it there when it is complete."""
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for text in texts:
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        temporary.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)

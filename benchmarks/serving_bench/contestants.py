"""Who serves: our server, and the rivals found in a folder of environments.

    RIVALS/llama.cpp/bin/llama-server       a GGUF file
    RIVALS/vllm/bin/vllm                    a Hugging Face folder, bfloat16
    RIVALS/transformers/bin/transformers    the same folder, `transformers serve` with continuous batching

benchmarks/README.md says how each environment is made. Everybody gets the same model, the same number of threads and
room for the same number of sequences; otherwise their own defaults, which their authors chose. Who is not there is left
out with a sentence.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onebit_core
from onebit_core.artifact.identity import read_manifest
from onebit_core.model.loading import find_folder

KV_CACHE_GIB = 1
"""For those who set a size: room for 64 sequences of 350 tokens of the sample model in float32."""
SPARE_TOKENS = 16
"""Room of a sequence beyond prompt and completion, for tokens that a server adds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every server is started for.

    Attributes:
        threads: it may compute with.
        sequences: at once.
        tokens: of one, prompt and completion.
    """

    threads: int
    sequences: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """How one server is started and asked.

    Attributes:
        name: with its weights, such as "llama.cpp Q4_1".
        version: as it says itself.
        command: without the port.
        model: its name in requests.
        ready: path that answers 200 once the model is loaded.
        environment: more variables.
        extra: fields of a request that only this server wants.
    """

    name: str
    version: str
    command: tuple[str, ...]
    model: str
    ready: str
    environment: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def ours(artifact: Path, plan: Plan, more: tuple[str, ...] = ()) -> Contestant:
    """Return our server with one artifact; `more` are flags of onebit-serve."""
    manifest = read_manifest(artifact)
    words = [sys.executable, "-m", "service", str(artifact), "--max-num-sequences", str(plan.sequences)]
    words += ["--kv-cache-bytes", str(KV_CACHE_GIB << 30), *more]
    return Contestant(
        name=f"onebit {manifest.method} {manifest.bits.whole_model:.2f} bits",
        version=onebit_core.__version__,
        command=tuple(words),
        model=manifest.name,
        ready="/health/ready",
        environment={"OMP_NUM_THREADS": str(plan.threads), "OMP_WAIT_POLICY": "passive"},
        extra={"ignore_eos": True},
    )


def llama_cpp(program: Path, gguf: Path, plan: Plan) -> Contestant:
    """Return llama.cpp's server with one GGUF file; its context is shared out between the sequences."""
    words = [str(program), "--model", str(gguf), "--alias", "model", "--no-webui"]
    words += ["--threads", str(plan.threads), "--threads-batch", str(plan.threads)]
    words += ["--parallel", str(plan.sequences), "--ctx-size", str(plan.sequences * (plan.tokens + SPARE_TOKENS))]
    return Contestant(
        name=f"llama.cpp {_file_type(gguf)}",
        version=_version_of([str(program), "--version"], r"version: (\S+)"),
        command=tuple(words),
        model="model",
        ready="/health",
        extra={"ignore_eos": True},
    )


def vllm(program: Path, folder: Path, plan: Plan) -> Contestant:
    """Return vLLM's CPU build with a Hugging Face folder."""
    words = [str(program), "serve", str(folder), "--served-model-name", "model", "--dtype", "bfloat16"]
    words += ["--max-model-len", str(plan.tokens + SPARE_TOKENS), "--max-num-seqs", str(plan.sequences)]
    return Contestant(
        name="vLLM CPU bf16",
        version=_version_of([str(program.parent / "python"), "-m", "pip", "list"], r"(?m)^vllm\S*\s+(\S+)"),
        command=tuple(words),
        model="model",
        ready="/health",
        environment={
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{plan.threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        extra={"ignore_eos": True},
    )


def transformers_serve(program: Path, folder: Path, plan: Plan) -> Contestant:
    """Return `transformers serve`; it knows no ignore_eos, so the folder must name no end-of-sequence token."""
    words = [str(program), "serve", str(folder), "--continuous-batching", "--dtype", "bfloat16", "--device", "cpu"]
    words += ["--cb-max-memory-percent", "0.1"]  # by default it takes most of the memory
    return Contestant(
        name="transformers serve bf16",
        version=_version_of([str(program.parent / "python"), "-m", "pip", "list"], r"(?m)^transformers\s+(\S+)"),
        command=tuple(words),
        model=str(folder),
        ready="/health",
        environment={"OMP_NUM_THREADS": str(plan.threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"},
    )


def rivals(folder: Path, model: str, ggufs: list[Path], work: Path, plan: Plan) -> Iterator[Contestant]:
    """Yield every rival that is there; of the others say that they are not.

    Args:
        folder: of their environments.
        model: a Hugging Face folder or GGUF file, for those that read neither artifact nor `ggufs`.
        ggufs: files for llama.cpp, each a rival.
        work: where the folder without end-of-sequence token is made.
        plan: what they are started for.
    """
    llama_server = _program(folder, "llama.cpp", "llama-server")
    if llama_server:
        yield from (llama_cpp(llama_server, gguf, plan) for gguf in ggufs)
    others: dict[tuple[str, str], Callable[[Path, Path, Plan], Contestant]] = {
        ("vllm", "vllm"): vllm,
        ("transformers", "transformers"): transformers_serve,
    }
    for (environment, name), contestant in others.items():
        program = _program(folder, environment, name)
        if program:
            yield contestant(program, endless_folder(model, work), plan)


def endless_folder(model: str, work: Path) -> Path:
    """Return a copy of a Hugging Face folder that names no end-of-sequence token; its weights are links."""
    source, copy = find_folder(model), work / "model-without-end"
    if copy.exists():
        shutil.rmtree(copy)
    copy.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file.resolve())
        elif file.name in ("config.json", "generation_config.json"):
            values = json.loads(file.read_text(encoding="utf-8"))
            values["eos_token_id"] = None
            (copy / file.name).write_text(json.dumps(values, indent=2), encoding="utf-8")
        elif file.is_file():
            shutil.copy(file, copy)
    return copy


def _program(folder: Path, environment: str, name: str) -> Path | None:
    """Return a rival's program, or say that it is not there."""
    program = folder / environment / "bin" / name
    if os.access(program, os.X_OK):
        return program.absolute()
    print(f"left out: {environment}: there is no {environment}/bin/{name} in {folder.name}/", file=sys.stderr)
    return None


def _version_of(command: list[str], pattern: str) -> str:
    """Ask a program for its version."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(pattern, said.stdout + said.stderr)
    return found[1] if found else "unknown"


def _file_type(gguf: Path) -> str:
    """Return the kind of weights a GGUF file is named for, such as Q4_1."""
    found = re.search(r"(?i)(i?q\d\w*|tq\d\w*|b?f16|f32)$", gguf.stem)
    return found[1].upper() if found else gguf.stem

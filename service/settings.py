"""Every setting of the server: one class, from flags, then environment variables, then defaults.

A flag `--max-queued-requests 64` and the variable `ONEBIT_MAX_QUEUED_REQUESTS=64` mean the same; the flag wins. Lists
are repeated flags, or commas in a variable. A setting that cannot be meant is refused at start with one sentence,
before any model is read. `python -m service.settings` prints docs/settings.md, and a test compares the two, so the
page cannot fall behind this file.
"""

import ipaddress
import sys
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX = "ONEBIT_"
LONGEST_TAIL_SECONDS = 5.0


class Settings(BaseSettings):
    """Serve quantized models with an OpenAI-compatible API."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        cli_prog_name="onebit-serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
        frozen=True,
    )

    artifacts: Annotated[CliPositionalArg[list[str]], NoDecode] = Field(
        default=[],
        description="Artifact folders to load at start, each served under its manifest's name; or originals to "
        "compare with, a Hugging Face folder or a GGUF file, under the name of the folder or file.",
    )
    adapter: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="FOLDER or NAME=FOLDER of an adapter that `onebit adapt` wrote; served as MODEL:NAME with every "
        "model whose weights it was trained on, in the same batches.",
    )
    artifact_root: Path | None = Field(
        default=None,
        description="Folder where jobs write artifacts and from which the admin API may load them. "
        "Without it there are no jobs and nothing can be loaded later.",
    )
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on. Anything but loopback needs keys_file: without keys everybody is admin.",
    )
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 takes a free one and logs it.")
    admin_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="TCP port for /admin, which then answers there alone, so that a firewall can close it; 0 takes a "
        "free one and logs it. By default /admin is on the port of everything else.",
    )
    keys_file: Path | None = Field(
        default=None,
        description="JSON file of hashed API keys (`onebit-serve keys add`). Re-read when it changes.",
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Requests a key may send in a minute, for keys that have no limit of their own; beyond it 429.",
    )
    tokens_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Tokens, of prompts and completions, a key may use in a minute, for keys that have no limit of "
        "their own; beyond it 429.",
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="Where models run: auto, cpu, cuda or cuda:N."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of activations and KV cache; auto is float32 on CPU and bfloat16 on CUDA.",
    )
    backend: str = Field(
        default="auto",
        description="How packed layers compute: cpu and triton multiply packed bits (fast, least memory), "
        "dense unpacks once at load (memory of the original), reference unpacks at every call (slow). "
        "auto is cpu or triton by the device, or dense, with a warning, where that one cannot run.",
    )
    fuse: bool = Field(
        default=True,
        description="Whether decoder blocks of Llama, Mistral, Qwen2 and Qwen3 are computed in one call of the cpu "
        "backend, in float32 with pages of 16 tokens; others, and all without it, run transformers' own modules.",
    )
    decode_graphs: bool = Field(
        default=True,
        description="Whether steps that give one token to each sequence are recorded as CUDA graphs when a model is "
        "loaded; some seconds of the start, and some memory of the GPU.",
    )
    page_size: int = Field(default=16, ge=1, le=1024, description="Token positions in one page of KV cache.")
    kv_cache_bytes: int = Field(
        default=1 << 30,
        ge=1 << 16,
        description="Bytes of KV cache for each model. Decides how many tokens may be in flight together.",
    )
    kv_cache_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="How keys and values are kept: auto in dtype, int8 in a byte each and a scale per token and head. "
        "int8 holds 2 to 4 times as many tokens, changes logits slightly, and computes slower on CPU: blocks are not "
        "fused then.",
    )
    max_num_sequences: int = Field(
        default=64, ge=1, description="Sequences in one step of the engine; more wait in the queue."
    )
    max_batched_tokens: int = Field(
        default=1024,
        ge=1,
        description="Tokens in one step of the engine; a longer prompt is read in several steps. Running sequences get "
        "a token in every step, so a smaller number bounds their wait beside a long prompt, and a larger one reads "
        "prompts in fewer steps.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Whether the KV cache of a prompt's beginning is used again when another prompt begins alike. "
        "Requests with different cache_salt never share.",
    )
    max_queued_requests: int = Field(
        default=256,
        ge=1,
        description="Sequences that may wait in the engine of a model; beyond it the answer is 429.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt plus completion, in tokens; by default what the model was made for.",
    )
    max_body_bytes: int = Field(default=4 << 20, ge=1024, description="Largest request body; beyond it 413.")
    receive_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds from the first byte of a request, or from connecting, to its last; beyond it the "
        "connection is closed. Bytes that arrive do not extend it.",
    )
    send_timeout_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Seconds that an answer may wait for a client that takes next to nothing of it; beyond it the "
        "connection is closed and its sequences end.",
    )
    keep_alive_seconds: int = Field(
        default=15, ge=1, description="Seconds that a connection may stay open between two requests."
    )
    max_connections: int = Field(
        default=1000,
        ge=1,
        description="Open connections; beyond it the one that is idle the longest is closed, and if none is idle the "
        "newcomer gets 503. Less where the process may open fewer files.",
    )
    max_connections_per_address: int | None = Field(
        default=None,
        ge=1,
        description="Open connections of one address; leave it out behind a proxy, which is one address.",
    )
    max_choices: int = Field(
        default=128, ge=1, description="Largest number of completions in one request: prompts times n."
    )
    jobs_enabled: bool = Field(default=True, description="Whether compression jobs can be launched over HTTP.")
    jobs_database_url: str | None = Field(
        default=None,
        description="Where jobs are recorded: sqlite:///FILE or postgresql://...; "
        "by default jobs.db under ARTIFACT_ROOT/.jobs. SQLite must not lie on a network drive.",
    )
    jobs_database_url_file: Path | None = Field(
        default=None,
        description="File that holds jobs_database_url, for a URL with a password; an empty file says nothing.",
    )
    job_worker: bool = Field(
        default=True,
        description="Whether this server runs a job worker of its own. Without one jobs wait for an onebit-worker that "
        "shares the database and ARTIFACT_ROOT.",
    )
    job_worker_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name of this server's worker, the same after each restart and nobody else's; by default local "
        "with SQLite, else the host's name.",
    )
    job_max_crashes: int = Field(
        default=3,
        ge=1,
        description="How often in a row a job may kill what runs it, with nothing finished between, before it fails. "
        "Orderly restarts do not count.",
    )
    job_keep_days: float = Field(
        default=30.0,
        ge=0,
        description="Days after its end that a job's record and folder (log, finished blocks, a rejected artifact) are "
        "kept; 0 keeps them for ever. Artifacts under their name stay.",
    )
    job_sources: Annotated[list[Path], NoDecode] = Field(
        default=[], description="Folders from which jobs may read models and texts, besides artifact_root."
    )
    allow_hub: bool = Field(default=False, description="Whether jobs may name models by hub id (downloads).")
    shutdown_grace_seconds: float = Field(
        default=30.0,
        ge=1.0,
        description="Seconds from SIGTERM to exit. Running requests get all but the last fifth, at most 5 seconds, "
        "of them; then streams end with an error event.",
    )
    golden_check: Literal["on", "off"] = Field(
        default="on",
        description="Whether a model must answer its artifact's golden prompts as the reference did before it is "
        "served.",
    )
    memory_check: Literal["on", "off"] = Field(
        default="on",
        description="Whether a model is refused whose weights, KV cache and process do not fit into the free memory of "
        "the machine, container or GPU, beside what loaded models were promised.",
    )
    restore_models: bool = Field(
        default=True,
        description="Whether models and aliases that the admin API set up are there again after a restart. They are "
        "recorded in ARTIFACT_ROOT/.served.json.",
    )
    audit_file: Path | None = Field(
        default=None,
        description="File that gets a JSON line for each admin request, besides the log. Only ever appended to, and "
        "opened anew for each line, so logrotate may move it.",
    )
    score_share: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Share of finished sequences that a process of lowest priority scores against the original model: "
        "KL divergence and top-1 agreement on /metrics. It holds the original in memory.",
    )
    score_original: Annotated[list[str], NoDecode] = Field(
        default=[],
        description="NAME=FOLDER or NAME=FILE.gguf: the original to score a served model against. By default the one "
        "its manifest names, if it is there with the same weights.",
    )
    score_max_tokens: int = Field(
        default=512, ge=2, description="Tokens of a scored sequence that are compared, its last ones."
    )
    score_threads: int = Field(default=1, ge=1, description="Threads of each model's scorer.")
    score_device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="Where scorers run: cpu, cuda or cuda:N."
    )
    vllm_metric_names: bool = Field(
        default=False,
        description="Whether /metrics shows the engine's figures under vLLM's names too, for its dashboards and "
        "autoscalers.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least level of log lines. Lines are JSON on standard error."
    )

    @field_validator("artifacts", "adapter", "job_sources", "score_original", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        """Take `a,b` from an environment variable as a list of two."""
        return [part for part in value.split(",") if part] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Refuse settings that are each fine but dangerous or pointless together."""
        if self.keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, so keys_file is required; "
                "make one with `onebit-serve keys add` or listen on 127.0.0.1"
            )
        if self.jobs_database_url is not None and self.jobs_database_url_file is not None:
            raise ValueError("jobs_database_url and jobs_database_url_file both say where jobs are recorded; keep one")
        if not self.artifacts and self.artifact_root is None:
            raise ValueError("nothing to serve: name at least one artifact folder, or set artifact_root")
        return self

    @field_validator("jobs_database_url_file")
    @classmethod
    def _check_url_file(cls, value: Path | None) -> Path | None:
        """Refuse a file that cannot be read, which must not pass for an empty one."""
        if value is not None:
            try:
                value.read_text()
            except (OSError, ValueError) as error:
                raise ValueError(f"{value} cannot be read: {error}") from None
        return value

    @field_validator("score_original")
    @classmethod
    def _check_originals(cls, values: list[str]) -> list[str]:
        """Refuse what names no model or no file; a download belongs before the start of a server."""
        for value in values:
            name, _, path = value.partition("=")
            if not name or not path:
                raise ValueError(f"{value!r} is not of the form NAME=FOLDER or NAME=FILE.gguf")
            if not Path(path).expanduser().exists():
                raise ValueError(f"there is no original {path!r}")
        return values

    @property
    def originals(self) -> dict[str, str]:
        """Names of served models to the originals they are scored against."""
        return dict(value.split("=", 1) for value in self.score_original)

    @property
    def tail_seconds(self) -> float:
        """How much of the grace period is kept for stopping engines and worker: a fifth, at most 5 seconds."""
        return min(LONGEST_TAIL_SECONDS, self.shutdown_grace_seconds / 5)

    @property
    def served_file(self) -> Path | None:
        """Where models and aliases are recorded for the next start; None where they are not."""
        if not self.restore_models or self.artifact_root is None:
            return None
        return self.artifact_root.resolve() / ".served.json"

    @property
    def jobs_folder(self) -> Path | None:
        """Where jobs keep their database, configurations and finished blocks; None when there are no jobs."""
        if not self.jobs_enabled or self.artifact_root is None:
            return None
        return self.artifact_root.resolve() / ".jobs"

    @property
    def database_url(self) -> str | None:
        """The jobs' database, as SQLAlchemy writes it; None when there are no jobs."""
        if self.jobs_folder is None:
            return None
        in_file = self.jobs_database_url_file.read_text().strip() if self.jobs_database_url_file is not None else ""
        return self.jobs_database_url or in_file or f"sqlite:///{self.jobs_folder / 'jobs.db'}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_settings(arguments: list[str]) -> Settings:
    """Read the settings from flags and environment.

    Args:
        arguments: the command line, without the program's name.

    Raises:
        SystemExit: an unknown flag (code 2) or --help (code 0).
        ValueError: a value that cannot be meant; the text is one sentence.
    """
    try:
        return CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        raise ValueError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    """Turn pydantic's first complaint into one line that names the flag."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    return f"{flag_of(str(first['loc'][0]))}: {message[0].lower()}{message[1:]}"


def flag_of(name: str) -> str:
    """Return how a setting is given on the command line."""
    return "artifacts" if name == "artifacts" else "--" + name.replace("_", "-")


if __name__ == "__main__":
    from service.settings_page import settings_page  # it reads this module

    sys.stdout.write(settings_page())

"""What a scorer is started with, and what it says of a sequence; plain data, JSON on the pipe."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """What a scorer process is started with.

    Attributes:
        artifact: folder of the served model.
        original: folder or GGUF file to compare with; None for the one the artifact was made from, if it is still where
            the manifest says and has the same weights.
        device: "cpu", "cuda" or "cuda:N".
        num_threads: of the process, on a CPU.
        max_tokens: most tokens of a sequence that are scored, its last ones.
        log_level: of its own log, on its standard error.
    """

    artifact: str
    original: str | None = None
    device: str = "cpu"
    num_threads: int = 1
    max_tokens: int = 512
    log_level: str = "info"


@dataclass(frozen=True, kw_only=True)
class PositionScores:
    """The scored tokens of a prompt, or of a completion.

    Attributes:
        divergence: KL(original || served) of each, in nats.
        agreeing: how many of them both models rank first alike.
        recent: mean, median, p99 and max of the divergence over the latest tokens of all sequences; empty before any.
    """

    divergence: list[float]
    agreeing: int
    recent: dict[str, float]

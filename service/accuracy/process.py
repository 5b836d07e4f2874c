"""The scorer process: `python -m service.accuracy.process`, told what to do on its standard input.

    in    {config}, then {"tokens": [...], "num_prompt": 7} per sequence           one JSON object a line
    out   {"event": "loaded"} or {"event": "failed", "message"}, then {"event": "scored", "prompt", "completion"}
          or {"event": "unscored", "message"} per sequence

Both models read the tokens once, teacher-forced, and at every position their distributions of the next token are
compared as `onebit evaluate` compares them (`onebit_core.evaluation.divergence`). The process has the lowest priority
the system knows, so that it computes with what serving leaves over; it ends with its standard input, and with its
parent.
"""

import json
import logging
import os
import sys
from collections import deque
from dataclasses import asdict
from typing import Any, TextIO

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from onebit_core.artifact.reader import load_model
from onebit_core.errors import EvaluationError, NotEnoughMemory, OnebitError
from onebit_core.evaluation.divergence import summarize_divergence, token_agreement, token_divergence
from onebit_core.evaluation.logits import LogitsReader
from onebit_core.evaluation.run import choose_dtype, find_original
from onebit_core.model.head import PROBE_TOKENS
from onebit_core.model.loading import load_original
from service.accuracy.types import PositionScores, ScorerConfig
from service.engine.process import belong_to
from service.log import adopt_logger, configure_logging

log = logging.getLogger(__name__)

LOWEST_PRIORITY = 19
POSITIONS_PER_SLICE = 64
RECENT_TOKENS = 4096
EXIT_START_FAILED = 3


def main() -> None:
    """Load both models, then score what comes until the input ends."""
    out = _own_output()
    values = json.loads(sys.stdin.readline())
    belong_to(values.pop("parent_pid"))
    os.nice(LOWEST_PRIORITY)
    config = ScorerConfig(**values)
    configure_logging(config.log_level)
    adopt_logger("transformers")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(config.num_threads)
    try:
        pair = ModelPair(config)
    except (OnebitError, OSError, ValueError, RuntimeError, ImportError, MemoryError) as error:
        _say(out, event="failed", message=str(error) or type(error).__name__)
        sys.exit(EXIT_START_FAILED)
    _say(out, event="loaded")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            prompt, completion = pair.score(asked["tokens"], asked["num_prompt"])
        except (EvaluationError, RuntimeError) as error:
            _say(out, event="unscored", message=str(error))
        else:
            _say(out, event="scored", prompt=asdict(prompt), completion=asdict(completion))


def _own_output() -> TextIO:
    """Keep the pipe for our lines: whatever a library prints goes to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def _say(out: TextIO, **values: Any) -> None:
    out.write(json.dumps(values) + "\n")
    out.flush()


class ModelPair:
    """The original and the served model.

    Raises:
        OnebitError: one of them cannot be loaded, or they are not of one vocabulary.
    """

    def __init__(self, config: ScorerConfig) -> None:
        dtype = choose_dtype("auto", config.device)
        served = load_model(config.artifact, device=config.device, dtype=str(dtype).removeprefix("torch."))
        source = find_original(config.original, served.manifest.source)
        _check_memory(served.manifest.source.parameters * dtype.itemsize, source, config.device)
        original, _ = load_original(source, device=config.device, dtype=dtype)
        sizes = original.config.vocab_size, served.model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise EvaluationError(f"{source} has {sizes[0]} words and {config.artifact} {sizes[1]}: not the same model")
        context = getattr(original.config, "max_position_embeddings", None) or config.max_tokens
        self._max_tokens = min(config.max_tokens, context)
        probe_T = torch.zeros(PROBE_TOKENS, dtype=torch.int64)
        self._original = LogitsReader(original, probe_T)
        self._served = LogitsReader(served.model, probe_T)
        self._recent: tuple[deque[float], deque[float]] = (deque(maxlen=RECENT_TOKENS), deque(maxlen=RECENT_TOKENS))

    @torch.inference_mode()
    def score(self, tokens: list[int], num_prompt: int) -> tuple[PositionScores, PositionScores]:
        """Compare the models' predictions of the sequence's last `max_tokens` tokens.

        Args:
            tokens: prompt and completion.
            num_prompt: how many of them are the prompt's.

        Returns:
            What was found at the tokens of the prompt, and at those of the completion.

        Raises:
            EvaluationError: logits are not finite.
        """
        num_prompt = max(0, num_prompt - max(0, len(tokens) - self._max_tokens))
        tokens_T = torch.tensor(tokens[-self._max_tokens :])
        divergence_T, agreement_T = self._compare(tokens_T)
        if not bool(divergence_T.isfinite().all()):
            raise EvaluationError("logits of the original or of the served model are not finite")
        border = max(0, num_prompt - 1)  # position t predicts token t + 1
        parts = slice(None, border), slice(border, None)
        prompt, completion = (
            self._scores(divergence_T[part], agreement_T[part], recent)
            for part, recent in zip(parts, self._recent, strict=True)
        )
        return prompt, completion

    def _compare(self, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return divergence and agreement at every position that predicts a token of the sequence."""
        self._original.start(tokens_T)
        self._served.start(tokens_T)
        divergence: list[Tensor] = [torch.empty(0)]
        agreement: list[Tensor] = [torch.empty(0, dtype=torch.bool)]
        last = len(tokens_T) - 1
        for start in range(0, last, POSITIONS_PER_SLICE):
            stop = min(start + POSITIONS_PER_SLICE, last)
            log_p_TV = F.log_softmax(self._original.read(start, stop), dim=-1)
            log_q_TV = F.log_softmax(self._served.read(start, stop), dim=-1)
            divergence.append(token_divergence(log_p_TV, log_q_TV).cpu())
            agreement.append(token_agreement(log_p_TV, log_q_TV).cpu())
        return torch.cat(divergence), torch.cat(agreement)

    @staticmethod
    def _scores(divergence_T: Tensor, agreement_T: Tensor, recent: deque[float]) -> PositionScores:
        values: list[float] = divergence_T.tolist()
        recent.extend(values)
        summary: dict[str, float] = {}
        if recent:
            found = summarize_divergence(torch.tensor([list(recent)]))
            summary = {"mean": found.mean, "median": found.median, "p99": found.p99, "max": found.max}
        return PositionScores(divergence=values, agreeing=int(agreement_T.sum()), recent=summary)


def _check_memory(needed: int, source: str, device: str) -> None:
    """Refuse an original that would push the server out of memory."""
    free = psutil.virtual_memory().available
    if device == "cpu" and needed > free:
        raise NotEnoughMemory(
            f"{source} needs {needed / 2**30:.1f} GiB of memory to score against, and {free / 2**30:.1f} GiB are free"
        )


if __name__ == "__main__":
    main()

"""The training loop: all layers change together, until the student says what its teacher says.

    for each step:
        add up the gradients of a batch of windows, a few windows at a time
        scale them down to the largest norm allowed
        Adam on scales, levels and latents, Bop on signs; rates rise, then fall along half a cosine to a tenth
        now and then: KL on windows held out; the best latents so far are kept; a checkpoint

Latents and Adam's moments are float32, products run in bfloat16 where that is fast (mixed precision). The order of
windows follows from seed and epoch alone, so a run that continues from a checkpoint takes the same steps.

Sources: OneBit, arXiv:2402.11295, section 3.4 (the loss, Adam with betas 0.9 and 0.98); rates relative to a weight's
mean magnitude: ours. Bop: see there.

Shape suffixes: S = windows, B = windows of a step, T = tokens.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from onebit_core.errors import ArtifactError, Cancelled, ConfigError, CorruptArtifact, TrainingError
from onebit_core.latents import Latent
from onebit_core.latents.base import each_latent
from onebit_core.progress import Watch
from onebit_core.qat.bop import Bop, Pick, among_largest
from onebit_core.qat.checkpoint import Checkpoints, TrainingState
from onebit_core.qat.config import TrainingConfig
from onebit_core.qat.distillation import Losses
from onebit_core.qat.sharding import whole
from onebit_core.qat.world import World

ADAM_BETAS = (0.9, 0.98)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
LAST_RATE = 0.1
SEED_STRIDE = 1_000_003
"""Between the first epochs of two seeds; the generator looks at 32 bits of what it is given."""


@dataclass(frozen=True, kw_only=True)
class TrainingWindows:
    """Token ids, int64 [S, T] each; no window is in both.

    Attributes:
        train_ST: what is trained on.
        held_out_ST: what tells how far the training is.
    """

    train_ST: Tensor
    held_out_ST: Tensor


@dataclass(kw_only=True)
class TrainingResult:
    """What came of a training.

    Attributes:
        curve: one entry a look at the held-out windows: step, tokens trained on, held_out_kl, seconds, and means since
            the look before: kl, hidden. Where the objective is another quantity, its name is in kl's place.
        best: the entry whose latents were kept.
        steps: taken, fewer than asked for where it ended early.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    steps: int = 0


class Objective(Protocol):
    """What is learned; Distillation is one."""

    quantity: ClassVar[str]

    def losses(self, ids_BT: Tensor, *, hidden: bool) -> Losses:
        """Return the losses of windows, with gradients."""

    def mean_loss(self, ids_BT: Tensor) -> float:
        """Return the first of the losses of windows, without gradients."""


class Trainable(Protocol):
    """A module that learns; Latent is one."""

    def latents(self) -> list[nn.Parameter]:
        """Return what is behind signs and codes."""

    def factors(self) -> list[nn.Parameter]:
        """Return what is behind scales and levels."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield both, by name."""


class Trainer:
    """One training of a student's latents."""

    def __init__(
        self,
        objective: Objective,
        latents: Mapping[str, Trainable],
        windows: TrainingWindows,
        config: TrainingConfig,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.objective, self.windows, self.config, self.checkpoints = objective, windows, config, checkpoints
        self.latents = [latent for latent in latents.values() if isinstance(latent, Latent)]
        self._held_out = f"held_out_{objective.quantity}"
        self.world = World()
        self.is_sharded = config.shard and self.world.size > 1
        self.values = {
            f"{name}:{child}": value for name, latent in latents.items() for child, value in latent.named_parameters()
        }
        self.optimizers = _optimizers(latents, config, self.world.among_largest if self.is_sharded else among_largest)
        names = {id(value): name for name, value in self.values.items()}
        self._moments = {
            names[id(value)]: optimizer.state[value]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for value in group["params"]
        }
        if self.world.size > config.batch:
            raise ConfigError(
                f"training.batch {config.batch}: each of the {self.world.size} processes needs a window of every step; "
                "give more windows, or start fewer processes"
            )
        self.result = TrainingResult()
        self._best: dict[str, Tensor] = {}
        self._since_look: list[tuple[float, float]] = []
        self._started = time.monotonic()

    def run(self, watch: Watch) -> TrainingResult:
        """Train; the latents end as the best that were seen.

        Raises:
            TrainingError: loss or gradient is not finite.
            ConfigError: processes that train together have found other checkpoints.
            Cancelled: inside a step, whose gradients are dropped, or between two; a checkpoint is written first.
        """
        self._check_together(self.checkpoints.step if self.checkpoints else 0)
        step = self._resume()
        try:
            while True:
                if self._is_due(step):
                    self._look(step, watch)
                if step == self.config.steps or self._has_stalled():
                    break
                loss = self._step(step, watch)
                step += 1
                watch.tell("train", step, self.config.steps, **{self.objective.quantity: round(loss, 4)})
                self._stop_together(watch)
                if step % self.config.checkpoint_every == 0:
                    self._keep(step)
        except Cancelled:
            with suppress(ArtifactError):  # a full disk loses steps, and is no reason to call it a failure
                self._keep(step)
            raise
        self._keep(step)
        self.result.steps = step
        self._restore(self._best)
        return self.result

    def _step(self, step: int, watch: Watch) -> float:
        """Take one step; return the loss of its windows."""
        rate = rate_at(step, self.config.steps, self.config.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate
            optimizer.zero_grad(set_to_none=True)
        batch_BT = self.windows.train_ST[order_of(step, len(self.windows.train_ST), self.config)]
        loss = hidden = 0.0
        for part_BT, share in self._parts(batch_BT):
            self._stop_alone(watch)
            losses = self.objective.losses(part_BT, hidden=self.config.alpha > 0)
            ((losses.logits + self.config.alpha * losses.hidden) * share).backward()
            loss += float(losses.logits.detach()) * share
            hidden += float(losses.hidden.detach()) * share
        if self.is_sharded:  # added up already
            self.world.drop_unreached(self.values.values())
        else:
            self.world.add_gradients(self.values.values())
        loss, hidden = self.world.total(loss, hidden)
        norm = float(whole(nn.utils.clip_grad_norm_(self.values.values(), self.config.largest_gradient)))
        for name, value in (("loss", loss + hidden), ("gradient", norm)):
            if not math.isfinite(value):
                raise self._diverged(f"the {name} of step {step + 1} is {value}")
        for optimizer in self.optimizers:
            optimizer.step()
        for latent in each_latent(self.latents):
            latent.settle()
        self._since_look.append((loss, hidden))
        return loss

    def _parts(self, windows_BT: Tensor) -> list[tuple[Tensor, float]]:
        """Return this process's windows, as many at a time as run at once, each part with its share of all windows.

        Where the model is spread, blocks are gathered by all: whoever has fewer parts runs one that counts nothing.
        """
        at_once, own_BT = self.config.windows_at_once, self.world.share(windows_BT)
        parts = [(part_BT, len(part_BT) / len(windows_BT)) for part_BT in own_BT.split(at_once) if len(part_BT)]
        if self.is_sharded:
            most = math.ceil(math.ceil(len(windows_BT) / self.world.size) / at_once)
            parts += [(windows_BT[:1], 0.0)] * (most - len(parts))
        return parts

    def _stop_alone(self, watch: Watch) -> None:
        """Stop in the middle of a step, if asked to and nobody waits for this process."""
        if self.world.size == 1:
            watch.cancel.raise_if_cancelled()

    def _stop_together(self, watch: Watch) -> None:
        """Stop between two steps, if any process was asked to."""
        if self.world.size > 1:
            if not self.world.any(watch.cancel.is_set):
                return  # a signal since then is seen by all after the next step
            watch.cancel.cancel()
        watch.cancel.raise_if_cancelled()

    def _check_together(self, step: int) -> None:
        """Refuse to go on from different steps."""
        if self.world.any(self.world.total(step)[0] != step * self.world.size):
            raise ConfigError(
                f"process {self.world.rank}: would go on from step {step}, another from another step; --work-dir must "
                "be on a disk that all processes see"
            )

    def _diverged(self, what: str) -> TrainingError:
        """Return the error of a training that cannot go on."""
        moving = {group["kind"] for optimizer in self.optimizers for group in optimizer.param_groups if group["params"]}
        rates = [f"training.{kind} ({getattr(self.config, kind)})" for kind in sorted(moving)]
        return TrainingError(f"training: {what}; lower {' or '.join(rates)}, or train in float32")

    def _is_due(self, step: int) -> bool:
        """Whether the held-out windows are to be measured, and have not been before a stop."""
        is_measured = bool(self.result.curve) and self.result.curve[-1]["step"] == step
        return not is_measured and (step == self.config.steps or step % self.config.evaluate_every == 0)

    def _look(self, step: int, watch: Watch) -> None:
        """Measure the held-out windows and note the best latents."""
        own = 0.0
        for part_BT, share in self._parts(self.windows.held_out_ST):
            self._stop_alone(watch)
            own += self.objective.mean_loss(part_BT) * share
        (held_out,) = self.world.total(own)
        if not math.isfinite(held_out):
            raise self._diverged(f"the held-out loss after step {step} is {held_out}")
        entry: dict[str, Any] = {
            "step": step,
            "tokens": step * self.config.batch * self.windows.train_ST.shape[1],
            self._held_out: round(held_out, 6),
            "seconds": round(time.monotonic() - self._started, 1),
        }
        if self._since_look:
            loss, hidden = (sum(part) / len(self._since_look) for part in zip(*self._since_look, strict=True))
            entry |= {self.objective.quantity: round(loss, 6), "hidden": round(hidden, 6)}
        self._since_look = []
        self.result.curve.append(entry)
        if not self.result.best or entry[self._held_out] < self.result.best[self._held_out]:
            self.result.best = entry
            self._remember_best()
        watch.tell("train", step, self.config.steps, **{self._held_out: entry[self._held_out]})

    def _remember_best(self) -> None:
        """Copy the latents, over the copy before."""
        for name, value in self.values.items():
            if name in self._best:
                self._best[name].copy_(value.detach())
            else:
                self._best[name] = value.detach().clone()

    def _has_stalled(self) -> bool:
        """Whether the last `patience` looks were no better than one before."""
        patience, curve = self.config.patience, self.result.curve
        return bool(patience) and curve[-1]["step"] - self.result.best["step"] >= patience * self.config.evaluate_every

    def _keep(self, step: int) -> None:
        """Write a checkpoint, where there is a folder for them."""
        if self.checkpoints and step and (self.world.is_first or self.is_sharded):
            self.checkpoints.save(self._state(step))

    def _state(self, step: int) -> TrainingState:
        """Return everything that the next step depends on."""
        tensors = {f"value:{name}": value.detach() for name, value in self.values.items()}
        tensors |= {f"best:{name}": value for name, value in self._best.items()}
        for name, moments in self._moments.items():
            for key, kept in moments.items():  # an expert that no token reached has none
                tensors[f"{key}:{name}"] = kept
        tensors["since_look"] = torch.tensor(self._since_look, dtype=torch.float64).reshape(-1, 2)
        return TrainingState(step=step, tensors=tensors, curve=self.result.curve)

    def _resume(self) -> int:
        """Take up the last checkpoint; return its step.

        Raises:
            CorruptArtifact: it is damaged, or of other layers.
        """
        state = self.checkpoints.load(self.values) if self.checkpoints else None
        if state is None:
            return 0
        tensors = state.tensors
        lacking = [name for name in self.values if not {f"value:{name}", f"best:{name}"} <= tensors.keys()]
        if lacking:
            raise CorruptArtifact(
                f"checkpoint of step {state.step}: no values of {lacking[0]}; remove it to train from the start"
            )
        self._restore({name: tensors[f"value:{name}"] for name in self.values})
        self._best = {name: tensors[f"best:{name}"] for name in self.values}
        for name, moments in self._moments.items():
            if f"step:{name}" in tensors:
                moments.update({key: tensors[f"{key}:{name}"] for key in MOMENTS})
        self._since_look = [tuple(pair) for pair in tensors["since_look"].tolist()]
        self.result.curve = state.curve
        self.result.best = min(state.curve, key=lambda entry: (entry[self._held_out], entry["step"]))
        self._started -= state.curve[-1]["seconds"]
        return state.step

    @torch.no_grad()
    def _restore(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.values[name].copy_(value)


def prepare(latent: Latent, config: TrainingConfig) -> None:
    """Make a fresh latent one that is trained as asked for."""
    for part in each_latent([latent]):
        part.surrogate = config.surrogate
        if config.scales == "closed_form":
            part.use_closed_form()


def _optimizers(latents: Mapping[str, Trainable], config: TrainingConfig, pick: Pick) -> list[torch.optim.Optimizer]:
    """Return what trains signs, where they have an optimizer of their own, and Adam for all else, with full rates."""
    signs: list[nn.Parameter] = []
    if config.sign_optimizer == "bop":
        whole = (latent for latent in latents.values() if isinstance(latent, Latent))
        signs = [value for latent in each_latent(whole) for value in latent.signs()]
    apart = {id(value) for value in signs}
    others = [value for latent in latents.values() for value in latent.latents() if id(value) not in apart]
    scales = [value for latent in latents.values() for value in latent.factors()]
    groups: list[dict[str, Any]] = [
        {"params": others, "full_rate": config.latent_rate, "kind": "latent_rate"},
        {"params": scales, "full_rate": config.scale_rate, "kind": "scale_rate"},
    ]
    result: list[torch.optim.Optimizer] = [torch.optim.Adam(groups, lr=0.0, betas=ADAM_BETAS, fused=True)]
    if signs:
        result.append(Bop(signs, among_largest=pick))
        result[-1].param_groups[0] |= {"full_rate": config.sign_rate, "kind": "sign_rate"}
    return result


def rate_at(step: int, steps: int, warmup: float) -> float:
    """Return the share of the full rate at a step: a straight rise, then half a cosine down to LAST_RATE."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def order_of(step: int, windows: int, config: TrainingConfig) -> Tensor:
    """Return the places of a step's windows: every epoch is a new order of all, cut into batches."""
    places = []
    for position in range(step * config.batch, (step + 1) * config.batch):
        epoch, place = divmod(position, windows)
        places.append(_epoch_order(epoch, windows, config.seed)[place])
    return torch.tensor(places)


@lru_cache(maxsize=4)
def _epoch_order(epoch: int, windows: int, seed: int) -> tuple[int, ...]:
    """Return the order of all windows in an epoch."""
    draw = torch.Generator().manual_seed((seed * SEED_STRIDE + epoch) % 2**32)
    return tuple(torch.randperm(windows, generator=draw).tolist())

"""The training of a classifier of series, by one seed."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from typing import Any

from ..requirements import requires
from .arrays import stratified_split
from .model import Classifier, Settings

with requires("torch"):
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

__all__ = ["Training", "adamw", "descend", "predict"]

#: What a training goes on from, beside its phase, settings and series.
_STATE = ("epoch", "steps", "history", "seconds", "random")
_PARTS = ("model", "averaged", "optimizer")


class Training:
    """One spec on one seed: choose the epoch, then fit again on all series.

    First a part of the series is fitted, and after each epoch the loss on the rest, the validation
    part, is taken. The epoch with the smallest is chosen. Then a new model is fitted on all series
    for so many epochs.

    Parameters
    ----------
    settings : Settings
    frames : float32 Tensor (count, N, channels)
        The series; what is in the padding changes nothing.
    real : bool Tensor (count, N)
        True for steps that are not padding.
    targets : int64 Tensor (count,)
        The class of each series, from 0; all classes are there.

    Attributes
    ----------
    phase : {"choose", "refit"}
    epoch : int
        Epochs of the phase so far.
    history : list of dict
        ``loss`` and ``accuracy`` on the validation part, for each epoch of the first fit.
    averaged : Classifier
        The model: the moving average of the weights.
    seconds : float

    Raises
    ------
    ValueError
        When no class has two series, so that none can validate.
    """

    def __init__(self, settings: Settings, frames: Tensor, real: Tensor, targets: Tensor) -> None:
        self.settings, self.data = settings, (frames, real, targets)
        parts = stratified_split(targets.numpy(), settings.validation, settings.seed)
        self.parts = tuple(map(torch.from_numpy, parts))
        if not len(self.parts[1]):
            raise ValueError(
                f"targets: got {len(targets)} series of as many classes, expected two or more of "
                "some class, as the epoch is chosen by series that are not fitted"
            )
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._begin("choose")

    def _begin(self, phase: str) -> None:
        """Start one of the two fits, from the same first weights."""
        self.phase, self.epoch = phase, 0
        frames, real, targets = self.data
        chosen = self.parts[0] if phase == "choose" else slice(None)
        self.fitted = frames[chosen], real[chosen], targets[chosen]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.model = Classifier(self.settings, frames.shape[2], int(targets.max()) + 1)
            self.random = torch.get_rng_state()
        self.model.standardize_by(*self.fitted[:2])
        self.averaged = deepcopy(self.model).requires_grad_(False)
        self.optimizer = adamw(self.model, self.settings)
        self.steps = 0

    @property
    def chosen(self) -> int:
        """The epoch, from 1, with the smallest validation loss so far."""
        return 1 + min(range(len(self.history)), key=lambda e: self.history[e]["loss"])

    @property
    def done(self) -> bool:
        """Whether both fits are at their end."""
        return self.phase == "refit" and self.epoch == self.chosen

    @property
    def share(self) -> float:
        """The estimated share of the work that is done."""
        if self.phase == "choose":
            return 0.5 * self.epoch / self.settings.epochs
        return 0.5 + 0.5 * self.epoch / self.chosen

    def advance(self) -> None:
        """Train for one epoch; in the first fit validate, or start the second.

        Raises
        ------
        FloatingPointError
            When the validation loss is no longer finite.
        """
        began = time.perf_counter()
        # Each training has a state of the random generator: other code neither changes nor sees it.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            self._train_one_epoch()
            self.random = torch.get_rng_state()
        if self.phase == "choose":
            self.history.append(self._validate())
            stale = self.epoch - self.chosen
            if self.epoch == self.settings.epochs or stale >= self.settings.patience:
                self._begin("refit")
        self.seconds += time.perf_counter() - began

    def _train_one_epoch(self) -> None:
        self.model.train()
        frames, real, targets = self.fitted
        for batch in torch.randperm(len(targets)).split(self.settings.batch):
            descend(
                self.model,
                self.optimizer,
                self.settings,
                frames[batch],
                real[batch],
                targets[batch],
            )
            self.steps += 1
            # Early on, the average must not be held back by the first weights.
            keep = min(self.settings.average, self.steps / (self.steps + 10))
            with torch.no_grad():
                for mean, p in zip(
                    self.averaged.parameters(), self.model.parameters(), strict=True
                ):
                    mean.lerp_(p, 1.0 - keep)
        self.epoch += 1

    def _validate(self) -> dict[str, float]:
        frames, real, targets = (x[self.parts[1]] for x in self.data)
        logits = predict(self.averaged, frames, real)
        loss = functional.cross_entropy(logits, targets).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss} after epoch {self.epoch}")
        return {
            "loss": loss,
            "accuracy": (logits.argmax(dim=1) == targets).double().mean().item(),
        }

    def state(self) -> dict[str, Any]:
        """Return all that the rest depends on beside settings and series, for `torch.save`."""
        parts = {name: getattr(self, name).state_dict() for name in _PARTS}
        return {name: getattr(self, name) for name in ("phase", *_STATE)} | parts

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._begin(state["phase"])
        for name in _STATE:
            setattr(self, name, state[name])
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])


def adamw(model: nn.Module, settings: Settings) -> Any:
    """Return the optimizer of a model; only the matrices of linear maps decay."""
    maps = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is weight for weight in maps)]
    return torch.optim.AdamW(
        [{"params": maps, "weight_decay": settings.decay}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.rate,
    )


def descend(
    model: nn.Module,
    optimizer: Any,
    settings: Settings,
    frames: Tensor,
    real: Tensor,
    targets: Tensor,
) -> None:
    """Take one step of training on a batch."""
    loss = functional.cross_entropy(
        model(frames, real), targets, label_smoothing=settings.smoothing
    )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def predict(model: nn.Module, frames: Tensor, real: Tensor) -> Tensor:
    """Return the logits of any number of series, without dropout and noise."""
    model.eval()
    with torch.no_grad():
        parts = zip(frames.split(256), real.split(256), strict=True)
        return torch.cat([model(f, r) for f, r in parts])

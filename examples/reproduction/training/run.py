"""The training of a classifier of time series on one seed, with checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pdcore.cli.files import FileError, replacing

from .model import Classifier, Settings
from .series import Pair, Series
from .splitting import stratified_split

__all__ = ["Run", "adamw", "descend", "predict", "try_step"]

#: Seconds between two writes of a checkpoint; a run that goes on from an older one repeats what is
#: missing, to the same numbers.
INTERVAL = 5.0


class Run:
    """One spec on one seed: choose the epoch, fit again on the whole training part, test once.

    First a part of the training series is fitted, and after each epoch the loss on the rest, the
    validation part, is taken. The epoch with the smallest is chosen. Then a new model is fitted
    on all training series for so many epochs. The test part is not used before that.

    Parameters
    ----------
    settings : Settings
    series : Pair
    """

    def __init__(self, settings: Settings, series: Pair) -> None:
        self.settings, self.series = settings, series
        self.parts = stratified_split(
            series.targets(series.train), settings.validation, settings.seed
        )
        self.history: list[dict[str, float]] = []
        self.result: dict[str, Any] | None = None
        self.seconds = 0.0
        self._begin("choose")

    def _begin(self, phase: str) -> None:
        """Start one of the two fits, from the same first weights."""
        self.phase, self.epoch = phase, 0
        train, targets = self.series.train, self.series.targets(self.series.train)
        chosen = self.parts[0] if phase == "choose" else np.arange(len(targets))
        self.fitted = _tensors(train, targets, chosen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.model = Classifier(self.settings, train.frames.shape[2], len(self.series.classes))
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
    def share(self) -> float:
        """The estimated share of the work that is done."""
        if self.phase == "choose":
            return 0.5 * self.epoch / self.settings.epochs
        return 0.5 + 0.5 * self.epoch / self.chosen

    def finish(
        self, checkpoint: Path | None = None, done: Callable[[float], None] = lambda share: None
    ) -> dict[str, Any]:
        """Do the rest of the run.

        Parameters
        ----------
        checkpoint : Path, optional
            The checkpoint, written from time to time and at the end.
        done : callable
            Called with the share of the work that is done.

        Returns
        -------
        dict
            ``spec``, ``seed``, ``epoch``, ``epochs``, ``history``, ``validation_accuracy``,
            ``test_accuracy`` (of 1), ``test_correct``, ``seconds``.

        Raises
        ------
        FloatingPointError
            When the validation loss is no longer finite.
        """
        written = time.monotonic()
        while (result := self.result) is None:
            self.advance()
            done(self.share)
            if checkpoint and (self.result or time.monotonic() - written >= INTERVAL):
                self.save(checkpoint)
                written = time.monotonic()
        return result

    def advance(self) -> None:
        """Train for one epoch; then validate, start the second fit, or test."""
        began = time.perf_counter()
        # Each run has a state of the random generator: other code neither changes nor sees it.
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
        if self.phase == "refit" and self.epoch == self.chosen:
            self._test()

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
        train = self.series.train
        held = _tensors(train, self.series.targets(train), self.parts[1])
        logits = predict(self.averaged, *held[:2])
        loss = functional.cross_entropy(logits, held[2]).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss} after epoch {self.epoch}")
        return {
            "loss": loss,
            "accuracy": (logits.argmax(dim=1) == held[2]).double().mean().item(),
        }

    def _test(self) -> None:
        test = self.series.test
        frames, real, targets = _tensors(test, self.series.targets(test))
        correct = int((predict(self.averaged, frames, real).argmax(dim=1) == targets).sum())
        self.result = {
            "spec": self.settings.spec,
            "seed": self.settings.seed,
            "epoch": self.chosen,
            "epochs": len(self.history),
            "history": self.history,
            "validation_accuracy": self.history[self.chosen - 1]["accuracy"],
            "test_accuracy": correct / len(targets),
            "test_correct": correct,
            "seconds": self.seconds,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint of all that the rest of the run depends on."""
        state = {
            "settings": asdict(self.settings),
            "series": self.series.digest(),
            "classes": list(self.series.classes),
            "phase": self.phase,
            "epoch": self.epoch,
            "steps": self.steps,
            "history": self.history,
            "result": self.result,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random,
        }
        with replacing(path, force=True) as stream:
            torch.save(state, stream)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        FileError
            When it cannot be read, or is from other series or settings; the message names the
            setting.
        """
        try:
            state = torch.load(path, weights_only=True)
        except OSError as error:
            raise FileError(f"{path}: {error.strerror or error}") from error
        except Exception as error:  # a damaged file may raise anything from the unpickler
            raise FileError(f"{path}: not a checkpoint: {type(error).__name__}") from error
        if not isinstance(state, Mapping) or "settings" not in state:
            raise FileError(f"{path}: not a checkpoint of this example")
        for name, value in asdict(self.settings).items():
            if state["settings"].get(name) != value:
                raise FileError(
                    f"{path}: made with {name} {state['settings'].get(name)}, now it is {value}"
                )
        if state["series"] != self.series.digest():
            raise FileError(f"{path}: made from other series")
        self._begin(state["phase"])
        for name in ("epoch", "steps", "history", "result", "seconds", "random"):
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])


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


def try_step(settings: Settings, series: Pair) -> None:
    """Compute the gradients of a few series, for the errors of a spec that does not fit."""
    frames, real, targets = _tensors(series.train, series.targets(series.train), slice(0, 4))
    model = Classifier(settings, frames.shape[2], len(series.classes))
    functional.cross_entropy(model(frames, real), targets).backward()


def predict(model: nn.Module, frames: Tensor, real: Tensor) -> Tensor:
    """Return the logits of any number of series, without dropout and noise."""
    model.eval()
    with torch.no_grad():
        parts = zip(frames.split(256), real.split(256), strict=True)
        return torch.cat([model(f, r) for f, r in parts])


def _tensors(part: Series, targets: Any, chosen: Any = slice(None)) -> tuple[Tensor, ...]:
    arrays = (part.frames, part.real, targets)
    return tuple(torch.from_numpy(np.ascontiguousarray(a[chosen])) for a in arrays)

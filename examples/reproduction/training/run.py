"""The training of a classifier of time series on one seed, with checkpoints and a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pdcore.cli.files import FileError, replacing
from pdcore_adapters.time_series.model import Classifier, Settings
from pdcore_adapters.time_series.training import Training, predict

from .series import Pair, Series

__all__ = ["Run", "tensors", "try_step"]

#: Seconds between two writes of a checkpoint; a run that goes on from an older one repeats what is
#: missing, to the same numbers.
INTERVAL = 5.0


class Run(Training):
    """A training on the training part, and one test; the test part is not used before that.

    Parameters
    ----------
    settings : Settings
    series : Pair
    """

    def __init__(self, settings: Settings, series: Pair) -> None:
        self.series = series
        self.result: dict[str, Any] | None = None
        super().__init__(settings, *tensors(series, series.train))

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
        super().advance()
        if self.done:
            self._test()

    def _test(self) -> None:
        frames, real, targets = tensors(self.series, self.series.test)
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
        about = {
            "settings": asdict(self.settings),
            "series": self.series.digest(),
            "result": self.result,
        }
        with replacing(path, force=True) as stream:
            torch.save(about | self.state(), stream)

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
        self.restore(state)
        self.result = state["result"]


def tensors(series: Pair, part: Series) -> tuple[Tensor, Tensor, Tensor]:
    """Return frames, real steps and classes of a part, as `Training` takes them."""
    frames, real, targets = map(torch.from_numpy, (part.frames, part.real, series.targets(part)))
    return frames, real, targets


def try_step(settings: Settings, series: Pair) -> None:
    """Compute the gradients of a few series, for the errors of a spec that does not fit."""
    frames, real, targets = (x[:4] for x in tensors(series, series.train))
    model = Classifier(settings, frames.shape[2], len(series.classes))
    functional.cross_entropy(model(frames, real), targets).backward()

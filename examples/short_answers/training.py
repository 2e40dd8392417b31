"""The training of several models on one split of a corpus, an epoch of each in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .models import Assessor, Texts

__all__ = ["Fit", "Settings", "fit_in_turn"]

#: The least number of steps of an epoch, about.
LEAST = 12


@dataclass(frozen=True)
class Settings:
    """The settings of a training, the same for every model.

    Attributes
    ----------
    epochs : int
        All are trained; the one with the smallest validation loss is kept.
    rate, decay : float
        Learning rate and weight decay of AdamW.
    dropout : float
        The dropout of features, outside attention.
    batch : int
        The number of answers in a step.
    """

    epochs: int
    rate: float
    decay: float = 0.01
    dropout: float = 0.2
    batch: int = 32


class Fit:
    """A model on one split and seed.

    Parameters
    ----------
    name : str
        A spec or ``gru``, as in `Assessor`.
    table : float Tensor (words, 50)
        The vectors of the words.
    parts : sequence of Texts
        To fit, to validate, and to test.
    seed : int
        The seed of the first weights and of all random numbers of the training.
    settings : Settings
    """

    def __init__(
        self, name: str, table: Tensor, parts: Sequence[Texts], seed: int, settings: Settings
    ) -> None:
        self.name, self.parts, self.seed, self.settings = name, parts, seed, settings
        self.losses: list[float] = []
        self.seconds: list[float] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Assessor(name, table, settings.dropout)
            self.random = torch.get_rng_state()
        self.best = deepcopy(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.decay)

    def advance(self) -> None:
        """Train for one epoch, whose seconds of the processor are kept, and validate.

        Raises
        ------
        FloatingPointError
            Where the validation loss is not finite.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            began = time.process_time()
            self._train()
            self.seconds.append(time.process_time() - began)
            self.random = torch.get_rng_state()
        held = self.parts[1]
        loss = functional.binary_cross_entropy_with_logits(self.logits(self.model, held), held[3])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss} in epoch {len(self.seconds)}")
        if loss < min(self.losses, default=math.inf):
            self.best.load_state_dict(self.model.state_dict())
        self.losses.append(float(loss))

    def _train(self) -> None:
        self.model.train()
        texts, size = self.parts[0], self.settings.batch
        # Batches of about one length need little padding: sorted within some batches at a time.
        # A small part is passed through several times.
        passes = max(1, round(LEAST * size / len(texts.correct)))
        batches = [
            batch
            for _ in range(passes)
            for some in torch.randperm(len(texts.correct)).split(8 * size)
            for batch in some[texts.lengths[some].argsort()].split(size)
        ]
        for i in torch.randperm(len(batches)):
            batch = texts.at(batches[i])
            loss = functional.binary_cross_entropy_with_logits(self.model(batch), batch.correct)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def logits(self, model: Assessor, texts: Texts) -> Tensor:
        """Return the logits (B,) of any number of answers, without dropout."""
        model.eval()
        out = torch.empty(len(texts.correct))
        with torch.no_grad():
            for rows in texts.lengths.argsort().split(256):
                out[rows] = model(texts.at(rows))
        return out

    def result(self) -> dict[str, Any]:
        """Return the result of the best epoch; the test part is used here only.

        ``balanced_accuracy`` is the mean of the accuracies on correct and on other answers.
        """
        epoch = 1 + min(range(len(self.losses)), key=self.losses.__getitem__)
        right = [
            ((self.logits(self.best, texts) > 0) == (texts.correct > 0)).double()
            for texts in self.parts
        ]
        correct = self.parts[2].correct > 0
        kinds = [right[2][correct == kind] for kind in (True, False)]
        recalls = [float(kind.mean()) for kind in kinds if len(kind)]
        return {
            "spec": self.name,
            "seed": self.seed,
            "epoch": epoch,
            "epochs": len(self.losses),
            "validation_losses": self.losses,
            "validation_accuracy": float(right[1].mean()),
            "test_accuracy": float(right[2].mean()),
            "balanced_accuracy": sum(recalls) / len(recalls),
            "test_answers": len(correct),
            "test_correct_share": float(correct.double().mean()),
            "seconds_of_epochs": self.seconds,
            "seconds": sum(self.seconds[:epoch]),
        }


def fit_in_turn(fits: Sequence[Fit], done: Callable[[float], None] = lambda share: None) -> None:
    """Train all models, one epoch of each in turn, in an order that rotates."""
    epochs = fits[0].settings.epochs
    for epoch in range(epochs):
        first = epoch % len(fits)
        for fit in (*fits[first:], *fits[:first]):
            fit.advance()
        done((epoch + 1) / epochs)

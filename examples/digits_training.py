"""A small transformer on the digits of scikit-learn: Flax NNX, trained with Optax."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax import numpy as jnp
from reproduction.training.series import digits

from pdcore_adapters.flax import attention_fn
from pdcore_adapters.time_series.arrays import stratified_split

__all__ = ["Classifier", "Digits", "Settings", "fit", "load", "predict", "try_spec"]

Array = np.ndarray[Any, Any]

CLASSES, SIDE = 10, 8


@dataclass(frozen=True)
class Settings:
    """The settings of a run, the same for every spec.

    Attributes
    ----------
    spec : str
        The attention of all layers.
    seed : int
        The seed of the split, the first weights, and all random numbers of the training.
    epochs, patience : int
        The limits on epochs, and on epochs without a better validation loss.
    validation : float
        Share of the training part that chooses the epoch.
    batch : int
        Images of one step.
    rate, decay : float
        Learning rate and weight decay of AdamW; only matrices decay.
    width, layers, heads : int
        Size of the model.
    """

    spec: str = "softmax"
    seed: int = 0
    epochs: int = 30
    patience: int = 6
    validation: float = 0.2
    batch: int = 64
    rate: float = 4e-3
    decay: float = 0.05
    width: int = 64
    layers: int = 2
    heads: int = 4


class Digits(NamedTuple):
    """Images (count, 8, 8) float32, and their classes (count,) int64."""

    train: Array
    train_targets: Array
    test: Array
    test_targets: Array


def load() -> Digits:
    """Return the digits: a fifth of each class is the test part, the rest standardizes both."""
    both = digits()
    fitted = both.train.frames
    mean, deviation = fitted.mean(), fitted.std()
    parts = [
        ((part.frames - mean) / deviation, both.targets(part)) for part in (both.train, both.test)
    ]
    return Digits(*parts[0], *parts[1])


class Layer(nnx.Module):
    """A pre-norm transformer layer, with Flax's layer around the attention of the spec."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs) -> None:
        width = settings.width
        self.attention = nnx.MultiHeadAttention(
            settings.heads, width, attention_fn=attention_fn(settings.spec), decode=False, rngs=rngs
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.inward = nnx.Linear(width, 2 * width, rngs=rngs)
        self.outward = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Transform; x (B, N, width)."""
        x = x + self.attention(self.norms[0](x))
        return x + self.outward(nnx.gelu(self.inward(self.norms[1](x))))


class Classifier(nnx.Module):
    """The eight rows of an image as tokens, layers of attention, their mean, a linear map."""

    def __init__(self, settings: Settings, rngs: nnx.Rngs) -> None:
        width = settings.width
        self.embed = nnx.Linear(SIDE, width, rngs=rngs)
        self.positions = nnx.Param(0.3 * jax.random.normal(rngs.params(), (SIDE, width)))
        self.layers = nnx.List([Layer(settings, rngs) for _ in range(settings.layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.classify = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, images: Any) -> Any:
        """Return the logits (B, 10) of images (B, 8, 8)."""
        x = self.embed(images) + self.positions[...]
        for layer in self.layers:
            x = layer(x)
        return self.classify(self.norm(x).mean(axis=1))


def _shifted(images: Any, key: Any) -> Any:
    """Move each image by up to one pixel, at random; what comes in is background."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)), constant_values=images.min())
    start = jax.random.randint(key, (len(images), 2), 0, 3)
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, at, (SIDE, SIDE)))(padded, start)


@nnx.jit(static_argnames="batch")
def _train_one_epoch(
    model: Classifier, optimizer: nnx.Optimizer, images: Any, targets: Any, key: Any, batch: int
) -> None:
    """Take a step for each full batch, in random order; the last images may be left out."""
    order, *keys = jax.random.split(key, 1 + len(images) // batch)
    shuffled = jax.random.permutation(order, len(images))[: len(keys) * batch]

    def step(carry: Any, chosen: Any, key: Any) -> Any:
        model, optimizer = carry
        moved = _shifted(images[chosen], key)

        def loss(model: Classifier) -> Any:
            return _cross_entropy(model(moved), targets[chosen])

        optimizer.update(model, nnx.grad(loss)(model))
        return model, optimizer

    every = nnx.scan(step, in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry)
    every((model, optimizer), shuffled.reshape(-1, batch), jnp.stack(keys))


def _cross_entropy(logits: Any, targets: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def predict(model: Classifier, images: Any) -> Any:
    """Return the logits (count, 10) of images."""
    return model(images)


def _validate(model: Classifier, images: Any, targets: Any, epoch: int) -> dict[str, float]:
    logits = predict(model, images)
    loss = _cross_entropy(logits, targets).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss} after epoch {epoch}")
    return {"loss": loss, "accuracy": (logits.argmax(1) == targets).mean().item()}


@cache
def _optimizer(rate: float, decay: float) -> optax.GradientTransformation:
    """Return AdamW, one object for all seeds: each object would compile the steps again."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    adamw = optax.adamw(rate, weight_decay=decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _copied(model: Classifier) -> Any:
    """Return a copy of the weights."""
    return jax.tree.map(jnp.copy, nnx.state(model))


def fit(
    settings: Settings, digits: Digits, done: Callable[[float], None] = lambda share: None
) -> tuple[Classifier, dict[str, Any]]:
    """Train one spec on one seed, and test the weights of the epoch with the best validation loss.

    Parameters
    ----------
    settings : Settings
    digits : Digits
    done : callable
        Called with the share of the work that is done.

    Returns
    -------
    model : Classifier
    result : dict
        ``spec``, ``seed``, ``epoch``, ``epochs``, ``history``, ``validation_accuracy``,
        ``test_accuracy`` (of 1), ``test_correct``, ``seconds``.

    Raises
    ------
    FloatingPointError
        When the validation loss is no longer finite.
    """
    began = time.perf_counter()
    fitted, held = stratified_split(digits.train_targets, settings.validation, settings.seed)
    images, targets = (jnp.asarray(x[fitted]) for x in (digits.train, digits.train_targets))
    validation = [jnp.asarray(x[held]) for x in (digits.train, digits.train_targets)]
    model = Classifier(settings, nnx.Rngs(settings.seed))
    optimizer = nnx.Optimizer(model, _optimizer(settings.rate, settings.decay), wrt=nnx.Param)
    key = jax.random.key(settings.seed)
    history: list[dict[str, float]] = []
    best, chosen = _copied(model), 0
    for epoch in range(1, settings.epochs + 1):
        _train_one_epoch(
            model, optimizer, images, targets, jax.random.fold_in(key, epoch), settings.batch
        )
        history.append(_validate(model, *validation, epoch))
        if chosen == 0 or history[-1]["loss"] < history[chosen - 1]["loss"]:
            best, chosen = _copied(model), epoch
        done(epoch / settings.epochs)
        if epoch - chosen >= settings.patience:
            break
    nnx.update(model, best)
    # The first look at the test part, and the only one.
    correct = int((predict(model, digits.test).argmax(1) == digits.test_targets).sum())
    return model, {
        "spec": settings.spec,
        "seed": settings.seed,
        "epoch": chosen,
        "epochs": len(history),
        "history": history,
        "validation_accuracy": history[chosen - 1]["accuracy"],
        "test_accuracy": correct / len(digits.test_targets),
        "test_correct": correct,
        "seconds": time.perf_counter() - began,
    }


def try_spec(settings: Settings) -> None:
    """Trace a model, for the errors of a spec that does not fit."""
    images = jnp.zeros((2, SIDE, SIDE))
    nnx.eval_shape(lambda: Classifier(settings, nnx.Rngs(0))(images))

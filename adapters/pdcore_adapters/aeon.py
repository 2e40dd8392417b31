"""`AttentionClassifier`, a small transformer as a classifier of aeon.

>>> from aeon.datasets import load_unit_test
>>> X, y = load_unit_test("train")
>>> model = AttentionClassifier("bn", random_state=0, epochs=2, width=16).fit(X, y)
>>> model.attention_maps(X[:1])[0].shape  # (layers, heads, tokens, tokens)
(2, 4, 24, 24)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from pdcore import AttentionSpec
from pdcore.extend import as_spec

from .diagnostics import HeadDistances, LayerCall
from .requirements import requires
from .time_series.arrays import patched, real_steps, stack

with requires("aeon"):
    import torch
    from aeon.classification import BaseClassifier
    from sklearn.utils import check_random_state

    from .time_series.model import Settings, layer_calls
    from .time_series.training import Training, predict

__all__ = ["AttentionClassifier"]

Array = np.ndarray[Any, Any]

#: The largest seed of PyTorch that every platform has.
_SEEDS = 2**31 - 1
_LARGEST = float(np.finfo(np.float32).max)


class AttentionClassifier(BaseClassifier):  # type: ignore[misc]
    """Classify time series by a small transformer, with any attention that a spec describes.

    The model embeds each token, runs `layers` pre-norm layers of attention, takes the mean over the
    tokens and maps it to the classes. It computes in float32 on the CPU, and standardizes channels
    itself. `fit` stops early: a stratified part of the series chooses the epoch, by its loss, and a
    new model is then fitted on all series for so many epochs.

    Series have any number of channels, and lengths that differ (a list of arrays). Missing values
    are refused, as by aeon.

    Parameters
    ----------
    spec : str or AttentionSpec
        The attention of all layers. Arrays that it leaves to the caller, such as
        ``bn(beta=param)``, are learned.
    random_state : int, RandomState or None
        The seed of the split, the first weights and all random numbers of the training.
    epochs, patience : int
        The limits on epochs, and on epochs without a smaller validation loss.
    validation : float
        The share of each class that validates: above 0, below 1.
    batch : int
        The number of series in a step.
    rate : float
        The learning rate of AdamW.
    width, layers, heads : int
        The features of a token, and the numbers of layers and of heads, which share the features.
    dropout : float
        The dropout of features in training, outside attention: from 0, below 1.
    noise : float
        The standard deviation of the noise that is added to standardized channels in training.
    tokens : int
        The most tokens of a series of `fit`: of longer ones, every so many consecutive steps are
        one token.
    verbose : bool
        Print a line for each epoch.

    Attributes
    ----------
    classes_ : array (n_classes,)
    model_ : torch.nn.Module
        The fitted model, for `pdcore_adapters.diagnostics.capture` too.
    history_ : list of dict
        ``loss`` and ``accuracy`` of the validation part, for each epoch.
    epoch_ : int
        The epoch, from 1, that was chosen.
    patch_ : int
        The number of steps in a token.

    Raises
    ------
    ValueError
        For arguments and series that do not make sense, and where no class has two series.
    FloatingPointError
        When the validation loss is no longer finite, as with too large a `rate`.
    SpecError, UnsupportedError
        For a spec that is none, or that this model cannot run.
    """

    _tags = {  # noqa: RUF012 - aeon reads it so
        "X_inner_type": ["np-list", "numpy3D"],
        "capability:multivariate": True,
        "capability:unequal_length": True,
        "algorithm_type": "deeplearning",
        "python_dependencies": "torch",
    }

    def __init__(
        self,
        spec: str | AttentionSpec = "softmax",
        *,
        random_state: Any = None,
        epochs: int = 100,
        patience: int = 25,
        validation: float = 0.2,
        batch: int = 32,
        rate: float = 2e-3,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        noise: float = 0.1,
        tokens: int = 64,
        verbose: bool = False,
    ) -> None:
        self.spec = spec
        self.random_state = random_state
        self.epochs = epochs
        self.patience = patience
        self.validation = validation
        self.batch = batch
        self.rate = rate
        self.width = width
        self.layers = layers
        self.heads = heads
        self.dropout = dropout
        self.noise = noise
        self.tokens = tokens
        self.verbose = verbose
        super().__init__()

    def attention_maps(self, X: Any) -> list[Array]:
        """Compute the weights of every layer and head.

        Parameters
        ----------
        X : array (n_series, channels, length), or list of arrays (channels, length)

        Returns
        -------
        list of float32 array (layers, heads, N, N)
            One for each series, of N tokens, `patch_` steps each: queries, then keys.
        """
        return [np.stack([call.weights()[0].numpy() for call in calls]) for calls in self._calls(X)]

    def head_redundancy(self, X: Any) -> dict[str, HeadDistances]:
        """Measure how far the heads of each layer are apart: the less, the more redundant they are.

        Parameters
        ----------
        X : array (n_series, channels, length), or list of arrays (channels, length)

        Returns
        -------
        dict of str to HeadDistances
            By the name of the layer in `model_`; float64 (n_series,) each.

        Raises
        ------
        ValueError
            With fewer than two heads.
        """
        return {
            calls[0].layer: _joined([call.distances() for call in calls])
            for calls in zip(*self._calls(X), strict=True)
        }

    def _fit(self, X: Any, y: Any) -> AttentionClassifier:
        settings = self._settings()
        self.patch_ = -(-max(x.shape[1] for x in X) // self.tokens)
        targets = torch.from_numpy(np.searchsorted(self.classes_, y))
        training = Training(settings, *self._tensors(X), targets)
        while not training.done:
            choosing = training.phase == "choose"
            training.advance()
            if self.verbose:
                print(_line(training, choosing))
        self.model_ = training.averaged.eval()
        self.history_, self.epoch_ = training.history, training.chosen
        return self

    def _predict(self, X: Any) -> Array:
        labels: Array = self.classes_[self._predict_proba(X).argmax(axis=1)]
        return labels

    def _predict_proba(self, X: Any) -> Array:
        logits = predict(self.model_, *self._tensors(X))
        probabilities: Array = torch.softmax(logits.double(), dim=1).numpy()
        return probabilities

    def _calls(self, X: Any) -> list[list[LayerCall]]:
        """Return the calls of the layers for each series, of its own length."""
        self._check_is_fitted()
        X = self._preprocess_collection(X, store_metadata=False)
        self._check_shape(X)
        frames, real = self._tensors(X)
        return [
            layer_calls(self.model_, series[:length])
            for series, length in zip(frames, real.sum(dim=1).tolist(), strict=True)
        ]

    def _tensors(self, X: Any) -> tuple[Any, Any]:
        """Return the tokens of series (count, N, channels), and which are real (count, N)."""
        if not all(np.abs(x).max() <= _LARGEST for x in X):
            raise ValueError(
                f"X: got values that float32 does not have, expected numbers from -{_LARGEST:.1e} "
                f"to {_LARGEST:.1e}; scale the series, or fill in what is missing"
            )
        frames, lengths = patched(*stack([x.T for x in X]), self.patch_)
        return torch.from_numpy(frames), torch.from_numpy(real_steps(frames, lengths))

    def _settings(self) -> Settings:
        """Check the arguments, and return the settings of the training."""
        for name in ("epochs", "patience", "batch", "width", "layers", "heads", "tokens"):
            _check(name, getattr(self, name), Integral, lambda n: n >= 1, "a whole number from 1")
        share = "a share above 0, below 1"
        _check("validation", self.validation, Real, lambda x: 0 < x < 1, share)
        _check("dropout", self.dropout, Real, lambda x: 0 <= x < 1, "a share from 0, below 1")
        _check("noise", self.noise, Real, lambda x: 0 <= x < math.inf, "a number from 0")
        _check("rate", self.rate, Real, lambda x: 0 < x < math.inf, "a number above 0")
        if self.width % self.heads:
            raise ValueError(
                f"heads: got {self.heads}, expected a divisor of width={self.width}, which they "
                "share"
            )
        names = ("epochs", "patience", "validation", "batch", "rate", "width", "layers", "heads")
        chosen = {name: getattr(self, name) for name in (*names, "dropout", "noise")}
        seed = self.random_state
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(_SEEDS)
        _check("random_state", seed, Integral, lambda n: 0 <= n < 2**32, "one from 0, below 2**32")
        return Settings(spec=str(as_spec(self.spec)), seed=int(seed), **chosen)

    @classmethod
    def _get_test_params(cls, parameter_set: str = "default") -> Any:
        """Return the arguments with which aeon checks the class: small and quick ones."""
        small = {"epochs": 2, "width": 8, "heads": 2, "layers": 1, "random_state": 0}
        return [small, {**small, "spec": "bn(beta=param)+sh(half=2)", "tokens": 6}]


def _joined(parts: Sequence[HeadDistances]) -> HeadDistances:
    """Return the distances of several series as arrays over them."""
    names = ("maps", "outputs", "relative")
    return HeadDistances(*(np.concatenate([getattr(x, name) for x in parts]) for name in names))


def _check(name: str, value: Any, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
    """Raise a ValueError for an argument that is not as expected."""
    if not isinstance(value, kind) or not fits(value):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def _line(training: Training, choosing: bool) -> str:
    """Return what is printed of an epoch."""
    if choosing:
        epoch = training.history[-1]
        return (
            f"epoch {len(training.history)} of at most {training.settings.epochs}: validation "
            f"loss {epoch['loss']:.4f}, accuracy {epoch['accuracy']:.1%}"
        )
    return f"all series: epoch {training.epoch} of {training.chosen}"

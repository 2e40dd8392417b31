"""A small transformer that classifies series."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pdcore
from pdcore.extend import Inputs, parameter_shape

from ..diagnostics import LayerCall, capture
from ..requirements import requires
from ..watching import tell

with requires("torch"):
    import torch
    from torch import Tensor, nn

__all__ = ["Attention", "Classifier", "Settings", "layer_calls"]


@dataclass(frozen=True)
class Settings:
    """The settings of a run; the same for every spec unless said otherwise.

    Attributes
    ----------
    spec : str
        The attention of both layers.
    seed : int
        The seed of the split, the first weights, and all random numbers of the training.
    epochs, patience : int
        The limits on epochs, and on epochs without a better validation loss.
    validation : float
        Share of the training part that chooses the epoch.
    batch : int
        The number of series in a step.
    rate, decay : float
        Learning rate and weight decay of AdamW; only the matrices of linear maps decay.
    width, layers, heads : int
        Size of the model.
    dropout : float
        The dropout of features, outside attention.
    noise : float
        Standard deviation of the noise that is added to standardized channels.
    crop : float
        The largest share of a series' steps that is cut off, at either end.
    smoothing : float
        The smoothing of the labels.
    average : float
        The decay of the moving average of the weights, which is the result.
    """

    spec: str = "softmax"
    seed: int = 0
    epochs: int = 150
    patience: int = 30
    validation: float = 0.2
    batch: int = 32
    rate: float = 1e-3
    decay: float = 0.05
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    noise: float = 0.3
    crop: float = 0.2
    smoothing: float = 0.1
    average: float = 0.98


class Attention(nn.Module):  # type: ignore[misc]
    """Self-attention of one layer, computed by `pdcore.bind`.

    Parameters
    ----------
    spec : str
        Any spec. Arrays that it leaves to the caller, such as ``bn(beta=param)``, are learned.
    width, heads : int
        Features of a step, and heads that share them.
    """

    def __init__(self, spec: str, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = pdcore.bind(spec)
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)
        self.arrays = nn.ParameterDict()
        for p in self.attend.spec.parameters():
            if not p.differentiable:
                raise pdcore.UnsupportedError(
                    f"spec: {self.attend.spec} would have to keep {p.name} from batch to batch, "
                    "which this model does not; its arrays are learned"
                )
            shape = parameter_shape(p.shapes[0], heads, width // heads)
            start = 1.0 if p.default is None else p.default
            self.arrays[p.name] = nn.Parameter(torch.full(shape, start))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Attend; x (B, N, width), real (B, N) bool."""
        count, length, width = x.shape
        q, k, v = self.inward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # The spec's arrays go in by name; none for most specs.
        arrays = dict(self.arrays.items())
        mixed = self.attend(q, k, v, key_mask=real, params=arrays)
        tell(self, self.attend, Inputs(q, k, v, key_mask=real, params=arrays), mixed, "bhnd")
        return self.outward(mixed.transpose(1, 2).reshape(count, length, width))


class Layer(nn.Module):  # type: ignore[misc]
    """A pre-norm transformer layer."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.attention = Attention(settings.spec, width, settings.heads)
        self.mixer = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(2 * width, width),
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """Transform; x (B, N, width), real (B, N) bool."""
        x = x + self.dropout(self.attention(self.norms[0](x), real))
        return x + self.dropout(self.mixer(self.norms[1](x)))


class Classifier(nn.Module):  # type: ignore[misc]
    """Steps embedded one by one, layers of attention, the mean over the real steps, a linear map.

    Parameters
    ----------
    settings : Settings
    channels, classes : int
        Sizes of a step and of the result.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, settings: Settings, channels: int, classes: int) -> None:
        super().__init__()
        self.settings = settings
        # With the weights, so that a saved model takes series as they are in the file.
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.embed = nn.Linear(channels, settings.width)
        self.layers = nn.ModuleList([Layer(settings) for _ in range(settings.layers)])
        self.norm = nn.LayerNorm(settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.classify = nn.Linear(settings.width, classes)

    def standardize_by(self, frames: Tensor, real: Tensor) -> None:
        """Set mean and deviation of the channels from the real steps."""
        steps = frames[real].double()
        deviation = steps.std(dim=0, correction=0)
        self.mean.copy_(steps.mean(dim=0))
        # A constant channel becomes 0, not noise divided by nearly 0.
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, torch.inf))

    def forward(self, frames: Tensor, real: Tensor) -> Tensor:
        """Return the logits (B, classes) of frames (B, N, channels); real (B, N) bool.

        Frames where `real` is False change nothing. In training, noise is added
        and ends are cut off.
        """
        x = (frames - self.mean) / self.deviation
        if self.training:
            x = x + self.settings.noise * torch.randn_like(x)
            real = real & _kept(real, self.settings.crop)
        x = torch.where(real[..., None], x, 0.0)
        x = self.dropout(self.embed(x) + _positions(x.shape[1], self.settings.width))
        for layer in self.layers:
            x = layer(x, real)
        x = torch.where(real[..., None], self.norm(x), 0.0)
        return self.classify(x.sum(dim=1) / real.sum(dim=1, keepdim=True))


def layer_calls(model: Classifier, frames: Tensor) -> list[LayerCall]:
    """Return the call of each layer's attention for one series, without dropout and noise.

    Parameters
    ----------
    model : Classifier
    frames : Tensor (N, channels)
        The series, without padding.
    """
    model.eval()
    real = torch.ones(1, len(frames), dtype=torch.bool)
    with torch.no_grad(), capture(model) as record:
        model(frames[None], real)
    # Every step is real, and a call without a mask is the plainest.
    return [replace(call, inputs=call.inputs._replace(key_mask=None)) for call in record.calls]


def _positions(length: int, width: int) -> Tensor:
    """Return sines and cosines (length, width) of the positions."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


def _kept(real: Tensor, share: float) -> Tensor:
    """Return the steps (B, N) bool that remain after random cuts at both ends of each series."""
    lengths = real.sum(dim=1, keepdim=True)
    draws = torch.rand(2, len(real), 1)
    cut = (draws[0] * share * lengths).floor()
    before = (draws[1] * (cut + 1)).floor()
    steps = torch.arange(real.shape[1])
    return (steps >= before) & (steps < lengths - (cut - before))

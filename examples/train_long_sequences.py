"""Train a small causal model on sequences that are cut over the processes of a group.

The second half of every sequence repeats its first half, so each token there can be told only by
a query that looks back half a sequence: over two processes, at keys of the other one. The loss is
that of one process, up to rounding:

    python examples/train_long_sequences.py --out one.json
    torchrun --nproc-per-node 2 examples/train_long_sequences.py --png curves.png one.json

PyTorch's launcher starts the processes; pdcore gets their group.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pdcore_adapters.torch_nn import PDMultiheadAttention

WORDS, WIDTH, HEADS = 16, 64, 4


class Block(nn.Module):  # type: ignore[misc]
    """Attention and two linear layers, each after a normalization and added to its input."""

    def __init__(self, spec: str, group: Any) -> None:
        super().__init__()
        self.attention = PDMultiheadAttention(
            WIDTH, HEADS, batch_first=True, spec=spec, group=group
        )
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixed = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for (B, N, width)."""
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mixed(self.second(x))


class Model(nn.Module):  # type: ignore[misc]
    """Words and positions, two blocks, and the logits of the next word."""

    def __init__(self, spec: str, length: int, group: Any) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(length, WIDTH)
        self.blocks = nn.Sequential(Block(spec, group), Block(spec, group))
        self.logits = nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor, places: Tensor) -> Tensor:
        """Compute the logits for words (B, N) at places (N,)."""
        x = self.words(words) + self.places(places)
        return self.logits(self.blocks(x))


def batch(size: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw sequences (size, length + 1) whose second half repeats the first."""
    half = torch.randint(WORDS, (size, length // 2), generator=generator)
    return torch.cat([half, half, half[:, :1]], 1)


def train(options: argparse.Namespace, group: Any) -> list[float]:
    """Train, and return the loss of each step, over the words of the second half."""
    rank, count = (group.rank(), group.size()) if group is not None else (0, 1)
    torch.set_default_dtype(torch.float64 if options.double else torch.float32)
    torch.manual_seed(0)  # the same weights on every rank
    model = Model(options.spec, options.length, group)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    places = torch.arange(options.length)
    told = options.batch * options.length // 2
    losses = []
    for _ in range(options.steps):
        drawn = batch(options.batch, options.length, generator)
        words, following, own = (
            x.tensor_split(count, -1)[rank].contiguous()
            for x in (drawn[:, :-1], drawn[:, 1:], places)
        )
        logits = model(words, own)
        each = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
        # This rank's part of the mean over all ranks, so that gradients add up.
        loss = each.view(following.shape)[:, own >= options.length // 2].sum() / told
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if group is not None:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=group)
            dist.all_reduce(total, group=group)
        optimizer.step()
        losses.append(float(total))
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print, keep and draw the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("beside", type=Path, nargs="*", help="losses of other runs, to draw too")
    parser.add_argument("--spec", default="causal+bn(statistics=prefix,eps=0.1)")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="where the losses go, as JSON")
    parser.add_argument("--png", type=Path, help="where to draw them")
    options = parser.parse_args(arguments)
    group = None
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    try:
        losses = train(options, group)
        if group is None or group.rank() == 0:
            report(options, losses, 1 if group is None else group.size())
    finally:
        if group is not None:
            dist.destroy_process_group()
    return 0


def report(options: argparse.Namespace, losses: list[float], count: int) -> None:
    """Print the first and last losses and the distance from other runs; write and draw all."""
    name = f"{count} process{'es' * (count > 1)}"
    print(f"{name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")
    if options.out:
        options.out.write_text(json.dumps({"name": name, "losses": losses}) + "\n")
    curves = {name: losses}
    for path in options.beside:
        kept = json.loads(path.read_text())
        curves[kept["name"]] = kept["losses"]
        pairs = zip(losses, kept["losses"], strict=True)
        print(f"largest distance from {kept['name']}: {max(abs(a - b) for a, b in pairs):.1e}")
    if options.png:
        draw(options.png, curves)


def draw(path: Path, curves: Mapping[str, list[float]]) -> None:
    """Draw the losses by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--", ":", "-."), strict=False):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name, linewidth=2)
    axes.set(xlabel="step", ylabel="loss of the repeated half", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    raise SystemExit(main())

"""`write_page`, a page about what `capture` recorded."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np

from .capturing import LIMIT, Capture, LayerCall
from .images import png_uri
from .pictures import as_maps

__all__ = ["write_page"]


def write_page(
    path: str | Path,
    captured: Capture,
    *,
    title: str = "Attention of a model",
    sequence: int = 0,
    rows: slice = slice(None),
    limit: int = LIMIT,
) -> Path:
    """Write one self-contained page: distances and maps of the last call of each layer.

    Parameters
    ----------
    path : str or Path
        The path of the page; an existing file is replaced.
    captured : Capture
        Of one or more calls.
    title : str
        Its heading.
    sequence : int
        The sequence of the batch whose maps are drawn; the distances are means over all.
    rows : slice
        The queries whose maps are drawn.
    limit : int
        The largest number of weights of a layer, as in `LayerCall.weights`.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    ValueError
        For a record without calls, and for more weights than `limit`.
    """
    if not captured.calls:
        why = "; ".join(f"{name}: {text}" for name, text in captured.left.items())
        raise ValueError(
            f"captured: got a record without calls, expected one or more: call the model within "
            f"capture(model){'; left: ' + why if why else ''}"
        )
    calls = [captured.of(layer)[-1] for layer in captured.layers]
    maps = [as_maps(_flat(call.weights(rows, limit))[sequence]) for call in calls]
    largest = max(float(x.max()) for x in maps) or 1.0
    left = "".join(
        f'<tr><th scope="row"><code>{html.escape(name)}</code></th><td>{html.escape(why)}</td></tr>'
        for name, why in captured.left.items()
    )
    page = _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        largest=f"{largest:.3g}",
        scale=png_uri(np.linspace(0.001, 1.0, 256)[None]),
        rows="\n".join(_row(call) for call in calls),
        cards="\n".join(_card(call, x, largest) for call, x in zip(calls, maps, strict=True)),
        left=f'<h2>Not recorded</h2><div class="wide"><table>{left}</table></div>' if left else "",
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _flat(weights: Any) -> Any:
    """Return weights (*B, H, N, M) with one axis of sequences."""
    return weights.reshape((-1, *weights.shape[-3:]))


def _row(call: LayerCall) -> str:
    q, k = call.inputs.q.shape, call.inputs.k.shape
    figures = ["one head"] * 3
    if q[-3] > 1 and call.inputs.segments is None:
        figures = [f"{x:.4g}" for x in call.distances().mean().values()]
    elif q[-3] > 1:
        figures = ["packed"] * 3
    cells = "".join(
        f'<td class="number">{x}</td>' for x in (str(q[-3]), f"{q[-2]} × {k[-2]}", *figures)
    )
    return (
        f'<tr><th scope="row"><code>{html.escape(call.layer)}</code></th>'
        f"<td><code>{html.escape(str(call.spec))}</code></td>{cells}</tr>"
    )


def _card(call: LayerCall, maps: Any, largest: float) -> str:
    name = html.escape(call.layer)
    heads = "".join(
        f'<figure><img alt="{name}, head {i}: weights of {w.shape[0]} queries over {w.shape[1]} '
        f'keys, largest {w.max():.2g}" src="{png_uri(w / largest)}">'
        f"<figcaption>head {i}</figcaption></figure>"
        for i, w in enumerate(maps, 1)
    )
    return (
        f"<section><h3><code>{name}</code></h3><p><code>{html.escape(str(call.spec))}</code></p>"
        f'<div class="heads">{heads}</div></section>'
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fbfbfa; --card: #fff; --line: #d9dbde;
  --none: #d5d7da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --paper: #15171a; --card: #1d2024;
  --line: #383d44; --none: #4a4f57; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; } h3 { font-size: 1rem; margin: 0; }
p { margin: 6px 0; max-width: 75ch; }
code { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
section, .wide { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
section { padding: 14px; margin: 14px 0; }
.wide { overflow-x: auto; }
.heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 10px; }
figure { margin: 0; } figcaption { font-size: .8rem; text-align: center; }
img { display: block; width: 100%; image-rendering: pixelated; background: var(--none); }
.scale { display: flex; align-items: center; gap: 8px; max-width: 360px; }
.scale img { height: 14px; min-width: 0; flex: 1; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 12px; border-bottom: 1px solid var(--line);
  font-weight: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p>The last call of each layer. Distances are L2 distances of two heads, means over pairs of heads
and over sequences: the smaller, the more the heads repeat one another.</p>
<div class="wide"><table>
<thead><tr><th scope="col">layer</th><th scope="col">attention</th>
<th scope="col" class="number">heads</th><th scope="col" class="number">queries × keys</th>
<th scope="col" class="number">maps</th><th scope="col" class="number">outputs</th>
<th scope="col" class="number">outputs / norm</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<h2>Maps</h2>
<p>A row is a query, a column a key. Colours go by the square root of the weight, alike in all
layers; grey is no weight at all.</p>
<div class="scale"><span>0</span><img alt="colour scale" src="{scale}"><span>{largest}</span></div>
{cards}
{left}
</main>
</body>
</html>
"""

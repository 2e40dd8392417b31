"""The page of the demo: the weights as embedded images, and the measurements."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pdcore.cli.files import replacing
from pdcore_adapters.diagnostics.images import png_uri

__all__ = ["write_page"]

Array = np.ndarray[Any, Any]


def write_page(path: Path, weights: Mapping[str, Array], result: Mapping[str, Any]) -> Path:
    """Write one self-contained page: the weights as embedded images, and the measurements.

    Parameters
    ----------
    path, weights, result
        As in `write_png`.

    Returns
    -------
    Path
        `path`.
    """
    utterance, q = result["utterance"], result["shape"]["q"]
    page = _PAGE.format(
        style=_STYLE,
        frames=utterance["frames"],
        milliseconds=f"{6.4 * utterance['frames']:.0f}",
        speaker=utterance["speaker"],
        cards="\n".join(_card(preset, weights[preset["spec"]]) for preset in result["presets"]),
        rows="\n".join(_rows(result)),
        count=q[0],
        heads=q[1],
        dim=q[3],
        scale=png_uri(np.linspace(0.001, 1.0, 256)[None]),
        projections=html.escape(result["projections"]),
        dataset=html.escape(result["dataset"]),
    )
    with replacing(path, force=True) as stream:
        stream.write(page.encode())
    return path


def _card(preset: Mapping[str, Any], weights: Array) -> str:
    spec = html.escape(preset["spec"])
    heads = "".join(
        f'<figure><img alt="{spec}, head {i}: weights of {w.shape[0]} queries over '
        f'{w.shape[1]} keys, largest {w.max():.2f}" src="{png_uri(w)}">'
        f"<figcaption>head {i}</figcaption></figure>"
        for i, w in enumerate(weights, 1)
    )
    return (
        f"<section><h2><code>{spec}</code></h2><p>{html.escape(preset['meaning'])}</p>"
        f'<div class="heads">{heads}</div>'
        f"<p>Head distance <strong>{preset['redundancy']['utterance']:.2f}</strong>, "
        f"{preset['redundancy']['mean']:.2f} on average</p></section>"
    )


def _rows(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for preset in result["presets"]:
        for name, r in preset["backends"].items():
            start = (
                f'<th scope="row"><code>{html.escape(preset["spec"])}</code></th>'
                f"<td>{html.escape(name)}</td>"
            )
            if "milliseconds" in r:
                low, high = r["spread"]
                ratio = r["versus_softmax"]
                cells = [
                    f"{r['error_over_budget']:.3f}",
                    f"{r['milliseconds']:.2f} <small>({low:.2f} to {high:.2f})</small>",
                    "" if ratio is None else f"{ratio:.2f}",
                ]
                labels = ("error / budget", "ms", "× softmax")
                end = "".join(
                    f'<td class="number" data-label="{label}"><span>{cell}</span></td>'
                    for label, cell in zip(labels, cells, strict=True)
                )
            else:
                end = f'<td colspan="3">{html.escape(r.get("refused") or r["failed"])}</td>'
            rows.append(f"<tr>{start}{end}</tr>")
    return rows


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a6068; --paper: #fbfbfa;
  --card: #ffffff; --line: #d9dbde; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --soft: #a3a9b1; --paper: #15171a;
  --card: #1d2024; --line: #383d44; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 8px; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 75ch; }
code { font-family: ui-monospace, monospace; }
.soft, figcaption, small { color: var(--soft); }
.cards { display: grid; gap: 16px; margin: 20px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 14px; }
.heads { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; margin: 8px 0; }
figure { margin: 0; }
figcaption { font-size: .8rem; text-align: center; }
img { display: block; width: 100%; image-rendering: pixelated; }
.scale { display: flex; align-items: center; gap: 8px; max-width: 360px; margin: 10px 0; }
.scale img { height: 14px; flex: 1; min-width: 0; image-rendering: auto; }
@media (min-width: 1280px) { .legend { grid-column: span 2; } }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; padding: 7px 12px; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: normal; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 640px) {
  thead { position: absolute; clip-path: inset(50%); }
  tr { display: grid; grid-template-columns: 1fr auto; padding: 8px 12px;
    border-bottom: 1px solid var(--line); }
  tr:last-child { border-bottom: 0; }
  th, td { border: 0; padding: 1px 0; }
  .number { grid-column: 1 / -1; display: flex; justify-content: space-between; }
  .number::before { content: attr(data-label); color: var(--soft); }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pdcore: attention weights of one utterance</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Attention weights of one utterance</h1>
<p>Speaker {speaker} says /ae/ in {frames} frames, {milliseconds} ms, and each attention sees the
same queries and keys: {projections}. Nothing is trained, so the pictures show what a choice of
attention does to a head, not what a model learns.</p>
<div class="cards">
<section class="legend"><h2>How to read it</h2>
<p>Each square is one head. A row is a query frame, a column a key frame; time runs down and to
the right. Colours go by the square root of the weight; blank is no weight at all.</p>
<div class="scale"><span>0</span><img alt="colour scale from 0 to 1" src="{scale}">
<span>1</span></div>
<p>Head distance is the mean L2 distance between the weights of two heads: the smaller it is,
the more the heads repeat one another. The average is over all {count} utterances.</p>
</section>
{cards}
</div>
<h1>Error and time</h1>
<p>All {count} utterances in one padded call, {heads} heads of {dim} features, float32. Up to 1,
the error is what rounding explains: the budget comes from the reference in float64. Such short
sequences mostly measure overhead; <code>pdcore bench</code> has long ones.</p>
<div class="wide"><table>
<thead><tr><th scope="col">attention</th><th scope="col">backend</th>
<th scope="col" class="number">error / budget</th>
<th scope="col" class="number">ms, median (quartiles)</th>
<th scope="col" class="number">&times; softmax</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
<p class="soft">{dataset}</p>
</main>
</body>
</html>
"""

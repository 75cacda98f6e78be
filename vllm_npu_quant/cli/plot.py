# SPDX-License-Identifier: Apache-2.0
"""Bar chart of the per-layer errors of ``compare``. SVG needs no dependency, PNG needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.sax.saxutils import escape

__all__ = ["bars_svg", "plot_problem", "write_plot"]

_ROW, _LEFT, _WIDTH = 18, 320, 480


def bars_svg(title: str, rows: Sequence[tuple[str, float]]) -> str:
    """An SVG of horizontal bars, one per (name, value)."""
    largest = max((value for _, value in rows), default=0.0) or 1.0
    height = _ROW * (len(rows) + 3)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 80}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="{_ROW}" font-size="13">{escape(title)}</text>',
    ]
    for number, (name, value) in enumerate(rows):
        y = _ROW * (number + 2)
        width = max(value / largest * _WIDTH, 1)
        lines += [
            f'<text x="{_LEFT - 6}" y="{y + 12}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 5}" fill="#3465a4"/>',
            f'<text x="{_LEFT + width + 4:.1f}" y="{y + 12}">{value:.2%}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def plot_problem(path: Path) -> str:
    """The reason why a plot cannot be written to this path; empty if it can. Checked before the measurement."""
    if path.suffix not in (".svg", ".png"):
        return "a plot is .svg or .png"
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        return "a .png needs matplotlib, which is not installed; .svg does not"
    if path.is_dir():
        return f"{path} is a folder"
    if not path.absolute().parent.is_dir():
        return f"there is no folder {path.parent}"
    return ""


def write_plot(path: Path, title: str, rows: Sequence[tuple[str, float]]) -> None:
    """Write a plot in the format given by the suffix of ``path``.

    Raises:
        ValueError: for a suffix other than .svg and .png, and for .png without matplotlib.
    """
    if path.suffix == ".svg":
        path.write_text(bars_svg(title, rows))
        return
    problem = plot_problem(path)
    if problem:
        raise ValueError(problem)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.2 * len(rows)))
    axes = figure.subplots()
    axes.barh([name for name, _ in rows], [value for _, value in rows])
    axes.invert_yaxis()
    axes.set_title(title)
    axes.tick_params(labelsize=6)
    figure.savefig(path, bbox_inches="tight", dpi=150)

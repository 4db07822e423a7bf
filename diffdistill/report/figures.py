"""Curves as SVG pictures inside data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLORS = ("#2f6fb2", "#d1603d", "#3a8f5c", "#8a5aa8", "#b8912a", "#5f6b7a", "#c4548a", "#3d9aa3")
MOST_POINTS = 1000
WINDOW = 0.02
LOG_FROM = 10.0


class Curve(NamedTuple):
    """Points of one line, in order of ``x``.

    Attributes:
        label: Its name in the legend.
        x: Steps of training, or of sampling.
        y: Values.
        low: Lower ends of intervals, where there are any.
        high: Upper ends.
    """

    label: str
    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def loss_figure(losses: Mapping[str, Sequence[Curve]]) -> str:
    """Return the losses of all runs, one plot for each name, smoothed over 2 % of the steps."""
    figure, plots = _plots(len(losses))
    for axes, (name, curves) in zip(plots, losses.items(), strict=True):
        values = np.concatenate([curve.y for curve in curves])
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            x, y = np.array(curve.x), np.array(curve.y)
            width = max(1, round(WINDOW * len(y)))
            axes.plot(*_thinned(x, y), color=color, alpha=0.2, linewidth=0.8)
            smooth = np.convolve(y, np.ones(width) / width, mode="valid")
            thin_x, thin_y = _thinned(x[len(x) - len(smooth) :], smooth)
            axes.plot(thin_x, thin_y, color=color, label=curve.label, linewidth=1.6)
        wide = values.min() > 0 and values.max() > LOG_FROM * values.min()
        axes.set_yscale("log" if wide else "linear")
        _finish(axes, name, "training step")
    return _uri(figure)


def few_step_figure(metrics: Mapping[str, Sequence[Curve]]) -> str:
    """Return each metric against the number of sampling steps, with confidence intervals."""
    figure, plots = _plots(len(metrics))
    for axes, (name, curves) in zip(plots, metrics.items(), strict=True):
        for index, curve in enumerate(curves):
            color = COLORS[index % len(COLORS)]
            axes.plot(curve.x, curve.y, "o-", color=color, label=curve.label, markersize=4)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15)
        steps = sorted({step for curve in curves for step in curve.x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [f"{step:g}" for step in steps])
        axes.minorticks_off()
        _finish(axes, name, "sampling steps")
    return _uri(figure)


def _plots(count: int) -> tuple[Figure, list[Any]]:
    columns = min(count, 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.6 * columns, 3.5 * rows), layout="constrained")
    plots = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in plots[count:]:
        unused.set_visible(False)
    return figure, plots[:count]


def _finish(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(_plain(title), fontsize=11)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_text(_plain(text.get_text()))


def _plain(text: str) -> str:
    """Return ``text`` so that matplotlib reads no mathematics in it."""
    return text.replace("$", r"\$")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every so many-th point, and the last."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MOST_POINTS)).round().astype(int))
    return x[kept], y[kept]


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffdistill"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "image/svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """Return ``content`` as a URI that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"

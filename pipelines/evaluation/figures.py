"""Curves of training and ablation as matplotlib's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def loss_figure(history: Sequence[dict[str, Any]], title: str) -> Figure:
    """Loss per step with its running mean, learning rate, and the validation metrics below."""
    steps = np.array([r["step"] for r in history])
    losses = np.array([r["train/loss"] for r in history])
    metrics = sorted({k for r in history for k in r if k in ("val/AP", "val/AP50", "val/IoU", "val/Dice")})
    figure = Figure(figsize=(8, 6.4 if metrics else 4), layout="constrained")
    axes = figure.subplots(2 if metrics else 1, 1, sharex=True, squeeze=False)[:, 0]
    width = max(1, len(losses) // 25)
    axes[0].plot(steps, losses, color="#9db4c8", linewidth=0.8, label="loss")
    smooth = np.convolve(losses, np.ones(width) / width, "valid")
    axes[0].plot(steps[width - 1 :], smooth, color="#1f4e79", label=f"mean of {width} steps")
    axes[0].set(ylabel="training loss", title=title, ylim=(0, None))
    rate = axes[0].twinx()
    rate.plot(steps, [r["lr"] for r in history], color="#c26a1b", linewidth=0.9, linestyle="--", label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    more, names = rate.get_legend_handles_labels()
    axes[0].legend(handles + more, labels + names, loc="upper right")
    if metrics:
        for name in metrics:
            points = [(r["step"], r[name]) for r in history if name in r]
            axes[1].plot(*zip(*points, strict=True), marker="o", label=name.removeprefix("val/"))
        axes[1].set(ylabel="validation", ylim=(0, 1))
        axes[1].legend(loc="lower right")
        axes[1].grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    return figure


def scene_figure(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """A bar for each scene, the worst on top, with its standard deviation over seeds where there are several.

    ``rows`` are those of scenes.csv; beside each bar stands how many planes the scene has.
    """
    shown = rows[:60]
    figure = Figure(figsize=(7.5, 1.2 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    values = np.array([row[metric] for row in shown], float)
    spread = np.array([row.get(f"{metric}_sd", np.nan) for row in shown], float)
    axes.barh(range(len(shown)), np.nan_to_num(values), color="#1f4e79")
    known = np.flatnonzero(np.isfinite(values) & np.isfinite(spread))
    axes.errorbar(values[known], known, xerr=spread[known], fmt="none", ecolor="#c26a1b", capsize=3)
    for i, (row, value) in enumerate(zip(shown, values, strict=True)):
        text = f"{value:.2f}" if np.isfinite(value) else "no planes"
        reach = np.nan_to_num(value) + np.nan_to_num(spread[i])
        axes.text(reach + 0.015, i, f"{text}, {row['planes']} planes" if np.isfinite(value) else text, va="center", size=8)
    axes.set_yticks(range(len(shown)), [str(row["scene"])[:40] for row in shown], size=8)
    axes.invert_yaxis()
    more = f" (the worst {len(shown)} of {len(rows)})" if len(shown) < len(rows) else ""
    axes.set(xlabel=f"{metric} out of fold", xlim=(0, 1.25), title=f"by scene, the worst first{more}")
    axes.set_xticks(np.linspace(0, 1, 6))
    return figure


def reliability_figure(
    before: Sequence[tuple[float, float, int]], after: Sequence[tuple[float, float, int]], title: str
) -> Figure:
    """Share of correct detections over score, and over calibrated probability; the diagonal is what both should be.

    ``before`` and ``after`` are (mean, share of correct ones, detections) of the bins; dots grow with the detections.
    """
    figure = Figure(figsize=(4.8, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle="--")
    for bins, colour, label in ((before, "#c26a1b", "score"), (after, "#1f4e79", "calibrated")):
        if bins:
            x, y, counts = (np.array(column, float) for column in zip(*bins, strict=True))
            axes.plot(x, y, color=colour, linewidth=1)
            axes.scatter(x, y, s=12 + 160 * counts / counts.max(), color=colour, alpha=0.6, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score, or probability", ylabel="share of correct detections", title=title)
    axes.legend(loc="upper left", markerscale=0.5)
    axes.grid(alpha=0.3)
    return figure


def seeds_figure(values: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Mean and standard deviation of each metric over trainings, with a dot for each of them."""
    figure = Figure(figsize=(max(4.0, 1.0 + 0.8 * len(values)), 4), layout="constrained")
    axes = figure.subplots()
    for i, numbers in enumerate(values.values()):
        known = np.array([v for v in numbers if np.isfinite(v)])
        if not len(known):
            continue
        spread = known.std(ddof=1) if len(known) > 1 else 0.0
        axes.bar(i, known.mean(), yerr=spread, color="#9db4c8", ecolor="#1f4e79", capsize=5)
        axes.plot(np.full(len(known), i), known, "o", color="#c26a1b", markersize=4)
        axes.text(i, 0.01, f"{known.mean():.3f}\n± {spread:.3f}", ha="center", va="bottom", size=8)
    axes.set_xticks(range(len(values)), list(values), rotation=30, ha="right")
    axes.set(ylim=(0, 1), title=title)
    return figure


def ablation_figure(
    bars: Sequence[tuple[str, float]],
    metric: str,
    losses: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    validation: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    validated: str,
    *,
    spreads: Sequence[float] = (),
) -> Figure:
    """Variants side by side: bars of the deciding metric, smoothed training loss, validation; one colour each.

    ``losses`` and ``validation`` are steps and values by the variant's label, ``spreads`` the standard deviations of the
    bars, NaN where nothing was repeated.
    """
    panels = 3 if any(len(steps) for steps, _ in validation.values()) else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    colours = {label: f"C{i % 10}" for i, (label, _) in enumerate(bars)}
    values = [0.0 if np.isnan(v) else v for _, v in bars]
    known = np.nan_to_num(np.array([*spreads] or [np.nan] * len(bars), float))
    errors = {"xerr": known, "capsize": 4} if known.any() else {}
    drawn = axes[0].barh(range(len(bars)), values, color=list(colours.values()), **errors)
    texts = [f"{v:.3f}" + (f" ± {s:.3f}" if s else "") for (_, v), s in zip(bars, known, strict=True)]
    axes[0].bar_label(drawn, ["failed" if np.isnan(v) else t for (_, v), t in zip(bars, texts, strict=True)], padding=3)
    axes[0].set_yticks(range(len(bars)), [label for label, _ in bars])
    axes[0].invert_yaxis()
    axes[0].set(
        xlabel=metric, xlim=(0, max([*(np.array(values) + known), 0.05]) * (1.4 if errors else 1.18)), title="result"
    )
    for label, (steps, loss) in losses.items():
        width = max(1, len(loss) // 25)
        smooth = np.convolve(loss, np.ones(width) / width, "valid") if len(loss) else np.zeros(0)
        axes[1].plot(steps[width - 1 :] if len(loss) else [], smooth, color=colours[label], label=label)
    axes[1].set(xlabel="step", ylabel="training loss (running mean)", ylim=(0, None), title="training")
    axes[1].legend()
    if panels == 3:
        for label, (steps, numbers) in validation.items():
            axes[2].plot(steps, numbers, color=colours[label], marker="o", label=label)
        axes[2].set(xlabel="step", ylabel=validated, ylim=(0, None), title="validation")
        axes[2].grid(alpha=0.3)
    return figure

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


def ablation_figure(
    bars: Sequence[tuple[str, float]],
    metric: str,
    losses: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    validation: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    validated: str,
) -> Figure:
    """Variants side by side: bars of the deciding metric, smoothed training loss, validation; one colour each.

    ``losses`` and ``validation`` are steps and values by the variant's label.
    """
    panels = 3 if any(len(steps) for steps, _ in validation.values()) else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    colours = {label: f"C{i % 10}" for i, (label, _) in enumerate(bars)}
    values = [0.0 if np.isnan(v) else v for _, v in bars]
    drawn = axes[0].barh(range(len(bars)), values, color=list(colours.values()))
    axes[0].bar_label(drawn, ["failed" if np.isnan(v) else f"{v:.3f}" for _, v in bars], padding=3)
    axes[0].set_yticks(range(len(bars)), [label for label, _ in bars])
    axes[0].invert_yaxis()
    axes[0].set(xlabel=metric, xlim=(0, max([*values, 0.05]) * 1.18), title="result")
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

"""Plots of the family-cost benchmark's summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.family_plan import WAYS

COLOURS = {
    "mmlg": "#c2410c",
    "direct": "#db2777",
    "tleg": "#9333ea",
    "sws": "#ca8a04",
    "scratch": "#475569",
    "distil": "#2563eb",
    "distil_joint": "#0891b2",
    "even": "#16a34a",
    "even_joint": "#65a30d",
    "even_plain": "#a3a3a3",
}


def plot_frontier(content: Mapping[str, Any], family: str, ancestor_flops: float) -> Figure:
    """Test quality against cost of every schedule of every way, without and with the ancestor; areas are what is shipped."""
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    metric = content["metric"]
    seeds = content["families"][family]["seeds"].values()
    for axis, key, title in zip(axes, ("flops", "flops_with_ancestor"), ("ancestor not counted", "ancestor counted"), strict=True):
        for way, name in WAYS.items():
            rows = [row for seed in seeds for row in seed["ends"] if row["way"] == way]
            if rows:
                x, y = [row[key] / 1e12 for row in rows], [100 * row["test"][metric] for row in rows]
                areas = [60 * row["share_of_ancestor"] for row in rows]
                axis.scatter(x, y, s=areas, color=COLOURS[way], alpha=0.75, label=name)
        axis.axvline(ancestor_flops / 1e12, color="#0f172a", lw=0.8, ls=":", label="the ancestor's own cost")
        axis.set(xscale="log", xlabel="TFLOP for the whole family", title=title)
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel(f"test {metric}, mean of the sizes (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False, markerscale=0.8)
    return figure


def plot_cost(content: Mapping[str, Any], family: str) -> Figure:
    """Cost against the quality that every size must have, one line per way and seed, with the marked targets' means."""
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axis = figure.subplots()
    for seed in content["families"][family]["seeds"].values():
        for way, points in seed["curve"].items():
            label = WAYS[way] if WAYS[way] not in axis.get_legend_handles_labels()[1] else None
            x, y = [100 * q for q, _ in points], [cost / 1e12 or math.nan for _, cost in points]
            axis.plot(x, y, color=COLOURS[way], lw=1.6, alpha=0.85, label=label)
        for mark, figures in seed["marks"].items():
            q = 100 * mean(figures["targets"].values())
            axis.axvline(q, color="#94a3b8", lw=0.8, ls=":")
            axis.annotate(mark, (q, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right", fontsize=7)
    axis.set(
        yscale="log", xlabel=f"validation {content['metric']} of every size (%)", ylabel="TFLOP for the whole family, ancestor not counted"
    )
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure

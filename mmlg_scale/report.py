"""family.json -> report.html: tables, plots and retrieval samples in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table
from torch import Tensor

from mmlg_scale.accounting import BYTES_PER_PARAMETER
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_text_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

NAMES = {
    "mmlg": "learngene",
    "scratch": "scratch",
    "distil": "separate distillation",
    "even": "even layer picking",
    "tleg": "TLEG",
    "sws": "SWS",
}
COLOURS = {"mmlg": "#c2410c", "scratch": "#475569", "distil": "#2563eb", "even": "#16a34a", "tleg": "#9333ea", "sws": "#ca8a04"}


def write_report(run_folder: Path) -> Path:
    """Draw RUN/report.html from RUN/family.json and, where it stands, RUN/retrieval_samples.json; returns its path.

    Raises:
        UserError: family.json is missing or damaged.
    """
    source = run_folder / "family.json"
    if not source.is_file():
        raise UserError(f"{run_folder} holds no family.json. mmlg family writes it at the end of its run.")
    try:
        family = json.loads(source.read_text())
        samples_file = run_folder / "retrieval_samples.json"
        samples = json.loads(samples_file.read_text()) if samples_file.is_file() else []
        page = render(family, samples)
    except (ValueError, KeyError) as error:
        raise UserError(f"{source} is damaged ({error!r}). Remove it and start mmlg family again: complete steps are kept.") from error
    target = run_folder / "report.html"
    write_text_atomic(target, page)
    return target


def render(family: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    """The page as HTML."""
    environment = Environment(loader=PackageLoader("mmlg_scale"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "ratio": ratio, "si": si, "seconds": seconds}
    return environment.get_template("report.html.j2").render(
        family=family,
        names=NAMES,
        sizes=rows_by_size(family),
        singles=[entry for entry in family["descendants"] if entry["modality"] != "both"],
        curves=_svg(plot_curves(family)),
        quality=_svg(plot_quality(family)),
        samples=samples,
        bytes_per_parameter=BYTES_PER_PARAMETER,
        recipe=yaml.safe_dump(family["recipe"], sort_keys=False),
    )


def percent(value: float | None) -> str:
    """0.473 -> 47.3 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def ratio(value: float | None) -> str:
    """4.8123 -> 4.81 x."""
    return "–" if value is None else f"{value:.2f} ×"


def si(value: float | None) -> str:
    """1.23e13 -> 12.3 T."""
    if value is None:
        return "–"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """87.25 -> 87 s; 200 -> 3 min 20 s."""
    if value is None:
        return "–"
    return f"{value:.0f} s" if value < 120 else f"{int(value // 60)} min {int(value % 60)} s"


def _label(entry: dict[str, Any]) -> str:
    return f"{entry['image_layers']} + {entry['text_layers']}"


def rows_by_size(family: dict[str, Any]) -> list[dict[str, Any]]:
    """The cost table: one group per size of both towers, smallest first; inside it one row per initialisation."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for entry in family["descendants"]:
        if entry["modality"] == "both":
            groups[entry["image_layers"], entry["text_layers"]].append(entry)
    order = list(NAMES)
    return [
        {"label": _label(entries[0]), "entries": sorted(entries, key=lambda entry: order.index(entry["init"]))}
        for _, entries in sorted(groups.items())
    ]


def plot_curves(family: dict[str, Any]) -> Figure:
    """Validation metric against FLOPs, one panel per size, with the target and what extraction cost."""
    groups, metric = rows_by_size(family), family["metric"]
    columns = min(3, max(1, len(groups)))
    rows = -(-len(groups) // columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(4.0 * columns, 2.9 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, group in zip(axes.flat, groups, strict=False):
        for entry in group["entries"]:
            points = entry["curve"]
            x, y = [point["flops"] / 1e12 for point in points], [100 * point[metric] for point in points]
            axis.plot(x, y, "o-", ms=3, lw=1.4, color=COLOURS[entry["init"]], label=NAMES[entry["init"]])
            if entry["init"] == "mmlg":
                axis.plot(x[:1], y[:1], "*", ms=12, color=COLOURS["mmlg"])
        target = group["entries"][0]["target"]
        if target is not None:
            axis.axhline(100 * target, color="#94a3b8", lw=0.8, ls="--")
        axis.set_title(f"{group['label']} layers", fontsize=10)
        axis.set_xlabel("TFLOP of its own training", fontsize=8)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    if groups:
        axes[0][0].set_ylabel(f"validation {metric} (%)", fontsize=8)
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.set_layout_engine("constrained")
    return figure


def plot_quality(family: dict[str, Any]) -> Figure:
    """Test metric against parameters: the learngene's descendants before training, and what each baseline ends with."""
    figure, axis = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    metric = family["metric"]
    for init, name in NAMES.items():
        entries = [entry for entry in family["descendants"] if entry["init"] == init and entry["modality"] == "both"]
        entries.sort(key=lambda entry: entry["params"])
        if not entries:
            continue
        x = [entry["params"] for entry in entries]
        colour = COLOURS[init]
        if init == "mmlg":
            y0 = [100 * entry["metrics_at_0"][metric] for entry in entries]
            axis.plot(x, y0, "*-", ms=9, color=colour, label="learngene, no training")
        if init != "mmlg" or any(len(entry["curve"]) > 1 for entry in entries):
            label = name if init != "mmlg" else "learngene, adapted"
            axis.plot(x, [100 * e["metrics_final"][metric] for e in entries], "o--", ms=4, color=colour, label=label)
    ancestor = family["ancestor"]
    axis.plot([ancestor["params"]], [100 * ancestor["metrics"][metric]], "D", color="#0f172a", label="ancestor")
    axis.axvline(family["learngene"]["params"], color=COLOURS["mmlg"], lw=0.8, ls=":", label="size of the learngene")
    axis.set_xlabel("parameters")
    axis.set_ylabel(f"test {metric} (%)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "mmlg"}):  # the same family gives the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def retrieval_samples(
    image_ND: Tensor,
    text_MD: Tensor,
    text_to_image_M: Tensor,
    captions: Sequence[str],
    image_png: Callable[[int], bytes],
    *,
    num_queries: int = 6,
    num_results: int = 5,
) -> list[dict[str, Any]]:
    """What a model finds for captions spread evenly over the split.

    Returns:
        [{"caption", "results": [{"png_base64", "correct", "score"}]}], best result first.
    """
    image_ND, text_MD = F.normalize(image_ND.float(), dim=-1), F.normalize(text_MD.float(), dim=-1)
    samples = []
    for query in torch.linspace(0, len(captions) - 1, num_queries).long().tolist():
        scores = image_ND @ text_MD[query]
        best = scores.topk(min(num_results, len(scores))).indices.tolist()
        results = [
            {
                "png_base64": base64.b64encode(image_png(index)).decode(),
                "correct": index == int(text_to_image_M[query]),
                "score": round(float(scores[index]), 4),
            }
            for index in best
        ]
        samples.append({"caption": captions[query], "results": results})
    return samples


def console_table(family: dict[str, Any]) -> Table:
    """The table at the end of a family run."""
    metric = family["metric"]
    table = Table(title=f"test {metric}; FLOPs to the target on validation")
    for column in ("layers", "initialised by", "parameters", "at step 0", "at the end", "FLOPs charged", "reached"):
        table.add_column(column, justify="left" if column in ("layers", "initialised by") else "right")
    for group in rows_by_size(family):
        for entry in group["entries"]:
            first = entry["metrics_at_0"][metric] if entry["metrics_at_0"] else None
            table.add_row(
                group["label"],
                NAMES[entry["init"]],
                si(entry["params"]),
                percent(first),
                percent(entry["metrics_final"][metric]),
                si(entry["flops_to_target"]),
                "yes" if entry["reached"] else "no",
            )
        table.add_section()
    learngene = family["learngene"]
    storage = percent(family["storage_ratio_ancestor"])
    extraction = si(learngene["flops"] + learngene["teacher_flops"])
    table.caption = (
        f"extraction {extraction}FLOP; cost ratio against scratch {ratio(family['cost_ratio'])}, "
        + "".join(f"against {NAMES[init]} {ratio(value)}, " for init, value in family["cost_ratio_by_baseline"].items())
        + f"with the ancestor {ratio(family['cost_ratio_with_ancestor'])}; storage {storage} of the ancestor"
    )
    return table

"""family.json -> report.html: tables, plots and retrieval samples in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch.nn.functional as F
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.table import Table
from torch import Tensor

from mmlg_scale.accounting import BYTES_PER_PARAMETER, Size, chance, size_of, standard_error, summarise
from mmlg_scale.bounds import MAX_JSON_BYTES, MAX_MANIFEST_BYTES
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.retrieval import retrieval_ranks
from mmlg_scale.files import write_text_atomic
from mmlg_scale.metric_names import KS
from mmlg_scale.reading import decoded, parse_json, read_bytes
from mmlg_scale.records import parse_record, read_record
from mmlg_scale.results import Charge, DescendantEntry, FamilyResult, Init, Summary

NAMES: dict[Init, str] = {
    "mmlg": "learngene",
    "direct": "learngene, pre-trained directly",
    "scratch": "scratch",
    "distil": "separate distillation",
    "even": "uniform layer selection",
    "tleg": "TLEG",
    "sws": "SWS",
}
SINGLE_METRICS = {
    "image_retrieval_recall@1": "image retrieval R@1",
    "text_retrieval_recall@1": "text retrieval R@1",
    "acc1": "zero-shot accuracy",
    "mean_per_class_recall": "mean per class",
}
RECALLS = tuple(f"{kind}_retrieval_recall@{k}" for kind in ("image", "text") for k in KS)
COLOURS = {
    "mmlg": "#c2410c",
    "direct": "#db2777",
    "scratch": "#475569",
    "distil": "#2563eb",
    "even": "#16a34a",
    "tleg": "#9333ea",
    "sws": "#ca8a04",
}


def write_report(run_folder: Path) -> Path:
    """Draw RUN/report.html from RUN/family.json and, where it is there, RUN/retrieval_samples.json; returns its path.

    Charges and ratios are derived again from the entries and their curves, so that the page can never disagree with them.

    Raises:
        UserError: a file is missing, is no JSON, or something that the page shows is missing.
    """
    source = run_folder / "family.json"
    if not source.is_file():
        raise UserError(f"{run_folder} has no family.json. mmlg family writes it at the end of its run.")
    family = FamilyResult.from_json(
        read_record(source, "result of a family", "Remove it and start mmlg family again.", MAX_MANIFEST_BYTES), str(source)
    )
    samples = _read_samples(run_folder / "retrieval_samples.json")
    target = run_folder / "report.html"
    write_text_atomic(target, render(summarise(family), samples))
    return target


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """What `retrieval_samples` returned, where it was kept."""
    if not path.is_file():
        return []
    hint = "Remove it; the report is drawn without it."
    raw = read_bytes(path, "list of retrieval samples", hint, MAX_JSON_BYTES)
    if raw.startswith(b"["):  # of an earlier version
        samples = parse_json(decoded(raw, path, hint), str(path), hint)
    else:
        samples = parse_record(raw, path, hint).get("samples")
    if not isinstance(samples, list) or not all(map(_is_sample, samples)):
        raise UserError(f"{path} is damaged: it is not a list of queries with results. {hint}")
    return samples


def _is_sample(value: Any) -> bool:
    """Whether a value is one of those that `retrieval_samples` describes."""
    query, found = ("caption", "png_base64") if isinstance(value, dict) and "caption" in value else ("png_base64", "caption")
    if not isinstance(value, dict) or not isinstance(value.get(query), str) or not isinstance(value.get("results"), list):
        return False
    if not isinstance(value.setdefault("rank", None), int | None):  # lists of an earlier version have none
        return False
    return all(
        isinstance(result, dict)
        and isinstance(result.get(found), str)
        and isinstance(result.get("correct"), bool)
        and isinstance(result.get("score"), (int, float))
        for result in value["results"]
    )


def render(family: FamilyResult, samples: Sequence[dict[str, Any]]) -> str:
    """The page as HTML.

    Args:
        family: what `accounting.summarise` returned.
        samples: what `retrieval_samples` returned; may be empty.
    """
    environment = Environment(loader=PackageLoader("mmlg_scale"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "points": points, "ratio": ratio, "dearer": dearer, "si": si, "seconds": seconds}
    singles = [entry for entry in family.descendants if entry.modality != "both"]
    return environment.get_template("report.html.j2").render(
        family=family,
        summary=_summary(family),
        names=NAMES,
        sizes=rows_by_size(family.descendants),
        totals=totals_rows(family),
        singles=singles,
        single_metrics={key: name for key, name in SINGLE_METRICS.items() if any(key in entry.metrics_final for entry in singles)},
        recalls=recall_rows(family),
        ks=KS,
        candidates=candidates(family),
        frontier=_svg(plot_frontier(family)) if totals_rows(family) else "",
        curves=_svg(plot_curves(family)),
        quality=_svg(plot_quality(family)),
        caption_queries=[sample for sample in samples if "caption" in sample],
        image_queries=[sample for sample in samples if "caption" not in sample],
        bytes_per_parameter=BYTES_PER_PARAMETER,
        recipe=yaml.safe_dump(family.recipe, sort_keys=False, allow_unicode=True),
    )


def percent(value: float | None) -> str:
    """0.473 -> 47.3 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def ratio(value: float | None) -> str:
    """4.8123 -> 4.81 x."""
    return "–" if value is None else f"{value:.2f} ×"


def dearer(value: float | None) -> bool:
    """Whether a ratio to the learngene's cost says that the learngene is the dearer way."""
    return value is not None and value < 1


def points(value: float | None) -> str:
    """A standard error: 0.0123 -> ± 1.2."""
    return "" if value is None else f" ± {100 * value:.1f}"


def si(value: float | None) -> str:
    """1.23e13 -> 12.3 T."""
    if value is None:
        return "–"
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """8.25 -> 8.2 s; 87.25 -> 87 s; 200 -> 3 min 20 s; 8000 -> 2 h 13 min; 500000 -> 5 d 19 h."""
    if value is None:
        return "–"
    if value < 120:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes >= 48 * 60:
        return f"{minutes // 1440:,} d {minutes // 60 % 24} h"
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


@dataclass(frozen=True)
class SizeRows:
    """The entries of one size, in the order of NAMES and seeds."""

    label: str
    entries: list[DescendantEntry]


def rows_by_size(descendants: Sequence[DescendantEntry]) -> list[SizeRows]:
    """The cost table: one group per size of both towers, smallest first; inside it one row per initialisation and seed."""
    groups: dict[Size, list[DescendantEntry]] = defaultdict(list)
    for entry in descendants:
        if entry.modality == "both":
            groups[size_of(entry)].append(entry)
    widths = {(entry.image_width, entry.text_width) for entries in groups.values() for entry in entries}
    order = list(NAMES)
    return [
        SizeRows(
            _label(entries[0], with_widths=len(widths) > 1),
            sorted(entries, key=lambda entry: (order.index(entry.init), entry.seed)),
        )
        for _, entries in sorted(groups.items(), key=lambda group: (group[1][0].params, group[0]))
    ]


def totals_rows(family: FamilyResult) -> list[dict[str, Any]]:
    """The table of totals: one row per way of making the whole family, with its cost in units of ours."""
    summary = _summary(family)
    ratios = {"mmlg": 1.0, "scratch": summary.cost_ratio, **summary.cost_ratio_by_baseline}
    scratch = summary.cost_ratio_with_ancestor
    ours = 1.0 if family.ancestor.flops is not None else None
    with_ancestor = {"mmlg": ours, "scratch": scratch, **summary.cost_ratio_with_ancestor_by_baseline}
    return [
        {"init": init, **vars(total), "ratio": ratios[init], "ratio_with_ancestor": with_ancestor[init]}
        for init in NAMES
        if (total := summary.totals_by_init.get(init)) is not None
    ]


def recall_rows(family: FamilyResult) -> list[dict[str, Any]]:
    """All recalls on the test split at the end, with their standard errors, of each way and size of both towers; the ancestor's first."""
    split = (family.splits or {}).get("test")

    def row(label: str, name: str, init: str, metrics: dict[str, float]) -> dict[str, Any]:
        values = [(metrics[key], standard_error(key, metrics[key], split) if split else None) for key in RECALLS]
        return {"label": label, "name": name, "init": init, "values": values}

    if not all(key in family.ancestor.metrics for key in RECALLS):
        return []
    rows = [row("ancestor", "", "", family.ancestor.metrics)]
    for group in rows_by_size(family.descendants):
        complete = [entry for entry in group.entries if all(key in entry.metrics_final for key in RECALLS)]
        rows += [row(group.label, NAMES[entry.init], entry.init, entry.metrics_final) for entry in complete]
    return rows


def candidates(family: FamilyResult) -> str:
    """The test split in words: its candidates, and what guessing gives."""
    split = (family.splits or {}).get("test")
    if split is None:
        return ""
    level = chance(family.metric, split)
    guessing = f"; guessing gives {percent(level)} {family.metric}" if level is not None else ""
    classes = f", {split.classes} classes" if split.classes else ""
    return f"The test split has {split.images:,} images and {split.captions:,} captions{classes}{guessing}."


def _summary(family: FamilyResult) -> Summary:
    assert family.summary is not None, "summarised first"
    return family.summary


def _charge(entry: DescendantEntry) -> Charge:
    assert entry.charge is not None, "summarised first"
    return entry.charge


def _label(entry: DescendantEntry, *, with_widths: bool) -> str:
    label = f"{entry.image_layers} + {entry.text_layers}"
    return f"{label} (width {entry.image_width} + {entry.text_width})" if with_widths else label


def plot_frontier(family: FamilyResult) -> Figure:
    """Mean test quality at the end against the whole family's cost, one mark per way; areas are what is shipped."""
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rows = totals_rows(family)
    for axis, key, title in zip(axes, ("flops", "flops_with_ancestor"), ("ancestor not counted", "ancestor counted"), strict=True):
        for row in rows:
            if row[key]:
                area = 25 + 90 * row["params_shipped"] / family.ancestor.params
                place, colour = (row[key], 100 * row["mean_metric_final"]), COLOURS[row["init"]]
                axis.scatter(*place, s=area, color=colour, alpha=0.75, label=NAMES[row["init"]])
        axis.axhline(100 * family.ancestor.metrics[family.metric], color="#0f172a", lw=0.8, ls=":", label="the ancestor's quality")
        axis.set(xlabel="FLOPs charged", title=title)
        axis.set_xscale("log")
        axis.margins(x=0.15, y=0.2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel(f"test {family.metric}, mean of the sizes (%)")
    _legend(figure, axes)
    return figure


def plot_curves(family: FamilyResult) -> Figure:
    """Validation metric against FLOPs, one panel per size, with the target; extraction's cost is shared and not drawn."""
    groups, metric = rows_by_size(family.descendants), family.metric
    columns = min(3, max(1, len(groups)))
    rows = -(-len(groups) // columns) or 1
    figure = Figure(figsize=(4.0 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    largest = max((entry.curve[-1]["flops"] for group in groups for entry in group.entries), default=0)
    scale, unit = next((pair for pair in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP")) if largest >= pair[0]), (1e9, "GFLOP"))
    for axis, group in zip(axes.flat, groups, strict=False):
        for entry in group.entries:
            points, colour = entry.curve, COLOURS[entry.init]
            x, y = [point["flops"] / scale for point in points], [100 * point[metric] for point in points]
            axis.plot(x, y, "o-", ms=3, lw=1.4, color=colour, label=NAMES[entry.init])
            if entry.init == "mmlg" and points[0]["step"] == 0:
                axis.plot(x[:1], y[:1], "*", ms=12, color=colour, clip_on=False, zorder=5)
        target = _charge(group.entries[0]).target
        if target is not None:
            axis.axhline(100 * target, color="#475569", lw=1.0, ls="--", alpha=0.8)
        axis.set_title(f"{group.label} layers", fontsize=10)
        axis.set_xlabel(f"{unit} of its own training", fontsize=8)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    if groups:
        axes[0][0].set_ylim(bottom=0)
        for row in axes:
            row[0].set_ylabel(f"validation {metric} (%)", fontsize=8)
        _legend(figure, axes.flat)
    return figure


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One legend above all panels."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=4, fontsize=8, frameon=False)


def plot_quality(family: FamilyResult) -> Figure:
    """Test metric against parameters (means over seeds): descendants before and after adaptation, and what each baseline ends with."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    axis, metric = figure.subplots(), family.metric
    groups = rows_by_size(family.descendants)

    def draw(init: str, key: str, style: str, label: str) -> None:
        found = [[e for e in group.entries if e.init == init and getattr(e, key)] for group in groups]
        points = [(entries[0].params, 100 * mean(getattr(entry, key)[metric] for entry in entries)) for entries in found if entries]
        if points:
            axis.plot(*zip(*points, strict=True), style, ms=9 if "*" in style else 4, color=COLOURS[init], label=label)

    draw("mmlg", "metrics_at_0", "*-", "learngene, no training")
    for init, name in NAMES.items():
        adapted = any(entry.init == init and len(entry.curve) > 1 for group in groups for entry in group.entries)
        if init != "mmlg" or adapted:
            draw(init, "metrics_final", "o--", "learngene, adapted" if init == "mmlg" else name)
    ancestor = family.ancestor
    axis.plot([ancestor.params], [100 * ancestor.metrics[metric]], "D", color="#0f172a", label="ancestor", clip_on=False)
    axis.axvline(family.learngene.params, color=COLOURS["mmlg"], lw=0.8, ls=":", label="size of the learngene")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axis.set(xlabel="parameters", ylabel=f"test {metric} (%)", ylim=(0, None))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "mmlg"}):  # the same family gives the same file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
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
    num_image_queries: int = 0,
    num_results: int = 5,
) -> list[dict[str, Any]]:
    """What a model finds for captions, and for images where asked, spread evenly over the split.

    Args:
        image_ND, text_MD: features of N images and M captions; normalised here.
        text_to_image_M: the image of each caption.
        image_png: an image's PNG by its number.

    Returns:
        A list that JSON takes; best result first, scores are cosines:
        {"caption", "rank", "results": [{"png_base64", "correct", "score"}]} for a caption,
        {"png_base64", "rank", "results": [{"caption", "correct", "score"}]} for an image; rank is that of the (best) right answer, from 1.
    """
    image_ND, text_MD = F.normalize(image_ND.float(), dim=-1), F.normalize(text_MD.float(), dim=-1)
    owner_M = text_to_image_M.tolist()
    image_ranks_M, text_ranks_N = retrieval_ranks(image_ND, text_MD, text_to_image_M)
    samples: list[dict[str, Any]] = []
    for query in _spread(len(captions), num_queries):
        found = [(index, index == owner_M[query], score) for index, score in _best(image_ND @ text_MD[query], num_results)]
        results = [{"png_base64": _base64(image_png(index)), "correct": right, "score": score} for index, right, score in found]
        samples.append({"caption": captions[query], "rank": int(image_ranks_M[query]), "results": results})
    for query in _spread(len(image_ND), num_image_queries):
        found = [(index, owner_M[index] == query, score) for index, score in _best(text_MD @ image_ND[query], num_results)]
        texts = [{"caption": captions[index], "correct": right, "score": score} for index, right, score in found]
        samples.append({"png_base64": _base64(image_png(query)), "rank": int(text_ranks_N[query]), "results": texts})
    return samples


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, evenly apart, the first and the last among them."""
    wanted = min(wanted, count)
    return [index * (count - 1) // max(1, wanted - 1) for index in range(wanted)]


def _best(scores_N: Tensor, wanted: int) -> list[tuple[int, float]]:
    top = scores_N.topk(min(wanted, len(scores_N)))
    return [(int(index), round(float(score), 4)) for score, index in zip(top.values, top.indices, strict=True)]


def _base64(payload: bytes) -> str:
    return base64.b64encode(payload).decode("ascii")


def console_table(family: FamilyResult) -> Table:
    """The table at the end of a family run."""
    metric = family.metric
    table = Table(title=f"test {metric}; FLOPs to the target on validation")
    for column in ("layers", "initialised by", "parameters", "at step 0", "at the end", "FLOPs charged", "reached"):
        table.add_column(column, justify="left" if column in ("layers", "initialised by") else "right")
    for group in rows_by_size(family.descendants):
        for entry in group.entries:
            first = entry.metrics_at_0[metric] if entry.metrics_at_0 else None
            table.add_row(
                group.label,
                NAMES[entry.init],
                si(entry.params),
                percent(first),
                percent(entry.metrics_final[metric]),
                si(_charge(entry).flops_to_target),
                {True: "yes", False: "no", None: "–"}[_charge(entry).reached],
            )
        table.add_section()
    summary = _summary(family)
    extraction = si(family.learngene.all_flops)
    rivals: dict[Any, float | None] = {"scratch": summary.cost_ratio, **summary.cost_ratio_by_baseline}
    table.caption = (
        f"extraction {extraction}FLOP; cost ratio "
        + ", ".join(f"against {NAMES[init]} {ratio(value)}" for init, value in rivals.items())
        + f", against scratch with the ancestor counted {ratio(summary.cost_ratio_with_ancestor)}; "
        + f"storage {percent(summary.storage_ratio_ancestor)} of the ancestor"
    )
    return table

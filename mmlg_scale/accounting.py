"""Parameters, bytes, FLOPs, seconds: the only place where a ratio is computed.

Cost of a family. For each size, the target q is what training from scratch ends with on the validation split (mean over seeds). Every
side is charged what it had spent at the first of two consecutive evaluations that reach q, or its full schedule where it
never does (and is marked).

    cost_ratio = sum over sizes of scratch's charge / (extraction, teacher included + sum over sizes of adaptation's charge)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

Entry = dict[str, Any]
Curve = Sequence[Mapping[str, Any]]
BYTES_PER_PARAMETER = 4
BASELINES = ("even", "distil", "tleg", "sws")


def forward_flops(config: Mapping[str, Any], *, image_layers: int | None = None, text_layers: int | None = None) -> dict[str, int]:
    """FLOPs of one sample's forward pass: {"image", "text", "total"}; a multiply-add counts as two.

    Counted: patch embedding, all matrix products of the blocks, attention scores and their product with the values, projections.
    Not counted: norms, activations, softmax, additions, table look-ups. Causal attention is charged in full, since it is computed so.

    Args:
        config: an open_clip configuration.
        image_layers, text_layers: depths in place of the configuration's; 0 leaves the blocks out.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    embed = config["embed_dim"]
    width, patch, side = vision.get("width", 768), vision.get("patch_size", 16), vision.get("image_size", 224)
    patches = (side // patch) ** 2
    layers = vision.get("layers", 12) if image_layers is None else image_layers
    image = 2 * patches * 3 * patch**2 * width + layers * _block_flops(patches + 1, width, vision.get("mlp_ratio", 4.0)) + 2 * width * embed
    width, length = text.get("width", 512), text.get("context_length", 77)
    layers = text.get("layers", 12) if text_layers is None else text_layers
    caption = layers * _block_flops(length, width, text.get("mlp_ratio", 4.0)) + 2 * width * embed
    return {"image": int(image), "text": int(caption), "total": int(image + caption)}


def _block_flops(tokens: int, width: int, mlp_ratio: float) -> float:
    """Four width x width products and two of the MLP per token, and the attention's two products per pair of tokens."""
    return 2 * tokens * (4 + 2 * mlp_ratio) * width**2 + 4 * tokens**2 * width


def parameter_counts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Parameters of a CLIP state dict, given name -> shape: image_blocks, text_blocks, image_stem, text_stem, shared, total."""
    counts = dict.fromkeys(("image_blocks", "text_blocks", "image_stem", "text_stem", "shared"), 0)
    for name, shape in shapes.items():
        size = 1
        for extent in shape:
            size *= extent
        if name in ("logit_scale", "logit_bias"):
            counts["shared"] += size
        else:
            tower = "image" if name.startswith("visual.") else "text"
            counts[f"{tower}_{'blocks' if 'transformer.resblocks.' in name else 'stem'}"] += size
    return {**counts, "total": sum(counts.values())}


def first_reached(curve: Curve, target: float, metric: str) -> Mapping[str, Any] | None:
    """The first of two consecutive evaluations at `target` or above.

    A curve of a single point at step 0 (a model used as written) has no second evaluation to wait for: that point decides.
    """
    if len(curve) == 1 and curve[0]["step"] == 0:
        return curve[0] if curve[0][metric] >= target else None
    for point, following in pairwise(curve):
        if point[metric] >= target and following[metric] >= target:
            return point
    return None


def charge(curve: Curve, target: float, metric: str) -> dict[str, Any]:
    """What a run costs up to the target: {"reached", "flops", "seconds", "step"}; its full schedule where it never reaches it."""
    point = first_reached(curve, target, metric)
    paid = point if point is not None else curve[-1]
    return {"reached": point is not None, "flops": paid["flops"], "seconds": paid["seconds"], "step": paid["step"]}


def size_of(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two entries the same size."""
    return tuple(entry[key] for key in ("image_layers", "text_layers", "image_width", "text_width", "modality"))


def targets(entries: Sequence[Entry], metric: str) -> dict[tuple[Any, ...], float]:
    """Target of each size: what scratch ends with on the validation split, mean over its seeds."""
    final: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for entry in entries:
        if entry["init"] == "scratch":
            final[size_of(entry)].append(entry["curve"][-1][metric])
    return {size: mean(values) for size, values in final.items()}


def summarise(family: Mapping[str, Any]) -> dict[str, Any]:
    """`family` with each descendant's target and charge, and the family's ratios.

    Sizes in the sum are those of both towers that have scratch and mmlg entries. Several seeds of a size are averaged.
    """
    metric = family["metric"]
    entries = [dict(entry) for entry in family["descendants"]]
    wanted = targets(entries, metric)
    for entry in entries:
        target = wanted.get(size_of(entry))
        paid = charge(entry["curve"], target, metric) if target is not None else None
        if entry["init"] == "scratch" and paid is not None and not paid["reached"]:
            # Scratch defines the target; where only its last evaluation is there, the full schedule is its cost, and it did get there.
            paid["reached"] = entry["curve"][-1][metric] >= target
        entry["target"] = target
        entry["reached"] = paid["reached"] if paid else None
        entry["flops_to_target"] = paid["flops"] if paid else None
        entry["seconds_to_target"] = paid["seconds"] if paid else None
    notes: list[str] = []
    counted = _sizes_in_sum(entries)
    ratios = _cost_ratios(family, entries, counted, notes)
    return {
        **family,
        "descendants": entries,
        "num_sizes_in_sum": len(counted),
        **ratios,
        **_storage_ratios(family, entries),
        "notes": notes,
    }


def _sizes_in_sum(entries: Sequence[Entry]) -> list[tuple[Any, ...]]:
    by_size: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for entry in entries:
        if entry["modality"] == "both":
            by_size[size_of(entry)].add(entry["init"])
    return [size for size, inits in by_size.items() if {"scratch", "mmlg"} <= inits]


def _sum_over_sizes(entries: Sequence[Entry], init: str, sizes: Sequence[tuple[Any, ...]], key: str) -> float | None:
    """Sum over sizes of the mean charge over seeds; None where a size is missing."""
    total = 0.0
    for size in sizes:
        found = [entry[key] for entry in entries if entry["init"] == init and size_of(entry) == size]
        if not found:
            return None
        total += mean(found)
    return total


def _cost_ratios(family: Mapping[str, Any], entries: Sequence[Entry], sizes: Sequence[tuple[Any, ...]], notes: list[str]) -> dict[str, Any]:
    names = ("cost_ratio", "cost_ratio_with_ancestor", "cost_ratio_seconds", "break_even_descendants", "mean_quality_at_0_over_scratch")
    if not sizes:
        notes.append("no size has both a scratch and an mmlg entry: cost ratios are not defined")
        return {**dict.fromkeys(names), "cost_ratio_by_baseline": {}}
    learngene, ancestor = family["learngene"], family["ancestor"]
    extraction = learngene["flops"] + learngene["teacher_flops"]
    scratch, adaptation = (_sum_over_sizes(entries, init, sizes, "flops_to_target") for init in ("scratch", "mmlg"))
    seconds = [_sum_over_sizes(entries, init, sizes, "seconds_to_target") for init in ("scratch", "mmlg")]
    assert scratch is not None
    assert adaptation is not None
    assert seconds[0] is not None
    assert seconds[1] is not None
    ours = extraction + adaptation
    by_baseline, with_ancestor = {}, {}
    for init in BASELINES:
        if not any(entry["init"] == init for entry in entries):
            continue
        cost = _sum_over_sizes(entries, init, sizes, "flops_to_target")
        if cost is None:
            notes.append(f"baseline {init} lacks a size of the sum: its ratio is not defined")
        by_baseline[init] = None if cost is None else cost / ours
        with_ancestor[init] = None if cost is None else (cost + ancestor["flops"]) / (ours + ancestor["flops"])
    missed = [entry for entry in entries if entry["init"] == "mmlg" and size_of(entry) in sizes and not entry["reached"]]
    if missed:
        total = sum(entry["init"] == "mmlg" and size_of(entry) in sizes for entry in entries)
        notes.append(
            f"{len(missed)} of {total} descendants never reach the target and are charged their whole adaptation: the cost ratios flatter "
            "the learngene. Give adaptation or extraction more steps."
        )
    saved = (scratch - adaptation) / len(sizes)
    return {
        "cost_ratio": scratch / ours,
        "cost_ratio_by_baseline": by_baseline,
        "cost_ratio_with_ancestor": scratch / (ours + ancestor["flops"]),
        "cost_ratio_with_ancestor_by_baseline": with_ancestor,
        "cost_ratio_seconds": seconds[0] / (learngene["seconds"] + seconds[1]),
        # The number of average descendants at which ancestor and extraction are paid for.
        "break_even_descendants": (ancestor["flops"] + extraction) / saved if saved > 0 else None,
        "mean_quality_at_0_over_scratch": _quality_at_0(family["metric"], entries, sizes),
    }


def _quality_at_0(metric: str, entries: Sequence[Entry], sizes: Sequence[tuple[Any, ...]]) -> float | None:
    """Mean test metric of descendants before any training, divided by the mean of scratch at its end, over the sizes in the sum."""
    ours = [e["metrics_at_0"][metric] for e in entries if e["init"] == "mmlg" and size_of(e) in sizes]
    theirs = [e["metrics_final"][metric] for e in entries if e["init"] == "scratch" and size_of(e) in sizes]
    return mean(ours) / mean(theirs) if theirs and mean(theirs) > 0 else None


def _storage_ratios(family: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """At equal precision and counting every parameter; the file's own bytes stand beside them in the report."""
    learngene = family["learngene"]["params"]
    written = [entry["params"] for entry in entries if entry["init"] == "mmlg"]
    return {
        "storage_ratio_ancestor": learngene / family["ancestor"]["params"],
        "storage_ratio_family": learngene / sum(written) if written else None,
    }

"""Parameters, bytes, FLOPs, seconds: the only place where a ratio is computed.

Cost of a family. For each size, the target q is what training from scratch ends with on the validation split (mean over seeds). Every
side is charged nothing where its untrained model is at q, else what it had spent at the first of two consecutive evaluations that reach q,
or its full schedule where it never does (and is then marked).

    cost_ratio = sum over sizes of scratch's charge / (extraction, teacher included + sum over sizes of adaptation's charge)

A method has two parts of cost: what it spends once (the learngene's extraction) and what it spends per size. The ancestor's training is
kept apart, because a pre-trained model is often at hand: every ratio is given without it and, where its cost is known, with it.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean
from typing import Any

from mmlg_scale.results import AncestorEntry, Charge, DescendantEntry, FamilyResult, LearngeneEntry, SplitSize, Summary, Totals

Curve = Sequence[Mapping[str, Any]]
Size = tuple[Any, ...]
BYTES_PER_PARAMETER = 4
"""fp32: sizes are compared at equal precision."""
BASELINES = ("even", "distil", "tleg", "sws", "direct")
"""What the learngene is compared with besides training from scratch."""
TextLength = int | Sequence[int] | None
"""Tokens of a caption that are computed: all captions' (cut), each one's (packed), or None: the context length."""
WITHOUT_ANCESTOR = ("scratch", "direct")
"""Ways that need no ancestor."""


def forward_flops(
    config: Mapping[str, Any],
    *,
    image_layers: int | None = None,
    text_layers: int | None = None,
    text_length: int | None = None,
    captions: int = 1,
    drops_patches: bool = False,
    pooled: Collection[str] = (),
) -> dict[str, int]:
    """FLOPs of one sample's forward pass: {"image", "text", "total"}, the image's and its captions'; a multiply-add counts as two.

    Counted: patch embedding, all matrix products of the blocks, attention scores and their product with the values, projections.
    Not counted: norms, activations, softmax, additions, table look-ups. Causal attention is charged in full, as is usual (Chowdhery et al.
    2022, appendix B). A single tower is charged its own part ("image" or "text"). ViT-B/32: 8.82 + 5.96 = 14.78 GFLOP.

    Args:
        config: an open_clip configuration of a VisionTransformer and a TextTransformer.
        image_layers, text_layers: depths in place of the configuration's; 0 leaves the blocks out.
        text_length: tokens of a caption that are computed, where captions are cut; None: the context length.
        captions: of the image.
        drops_patches: whether the configuration's patch dropout acts: blocks see the patches that stay, the embedding all.
        pooled: towers ("image", "text") whose last block computes only the position at which the tower is pooled (`towers.run_block`);
            without effect on an image tower that averages over its patches.
    """
    vision, text, embed = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    width, patch = vision.get("width", 768), vision.get("patch_size", 16)
    patches = math.prod(side // patch for side in height_and_width(vision.get("image_size", 224)))
    layers = vision.get("layers", 12) if image_layers is None else image_layers
    kept = max(1, int(patches * (1 - vision.get("patch_dropout", 0.0)))) if drops_patches else patches
    one_row = "image" in pooled and vision.get("pool_type", "tok") == "tok"
    image = 2 * patches * 3 * patch**2 * width + 2 * width * embed
    image += _blocks_flops(layers, kept + 1, width, vision.get("mlp_ratio", 4.0), one_row=one_row)
    width, length = text.get("width", 512), text.get("context_length", 77) if text_length is None else text_length
    layers = text.get("layers", 12) if text_layers is None else text_layers
    caption = _blocks_flops(layers, length, width, text.get("mlp_ratio", 4.0), one_row="text" in pooled) + 2 * width * embed
    return {"image": int(image), "text": captions * int(caption), "total": int(image) + captions * int(caption)}


def training_flops(
    config: Mapping[str, Any], *, text_length: int | None = None, captions: int = 1, pooled: Collection[str] = ("image", "text")
) -> int:
    """FLOPs of one sample's forward and backward pass: three times the forward pass, with patch dropout where the configuration has it.

    What is computed again in the backward pass (activation checkpointing) or for it (accumulation) is not counted. Arguments as for
    `forward_flops`; a tower whose last hidden state nothing is compared with is `pooled`.
    """
    return 3 * forward_flops(config, text_length=text_length, captions=captions, drops_patches=True, pooled=pooled)["total"]


def over_lengths(flops: Callable[[int | None], int], text_length: TextLength) -> int:
    """The mean over captions of what one costs, `flops` of its length, rounded."""
    if text_length is None or isinstance(text_length, int):
        return flops(text_length)
    return round(sum(count * flops(length) for length, count in Counter(text_length).items()) / len(text_length))


def height_and_width(size: int | Sequence[int]) -> Sequence[int]:
    """Of an image, as open_clip's configurations give its size."""
    return (size, size) if isinstance(size, int) else size


def _blocks_flops(layers: int, tokens: int, width: int, mlp_ratio: float, *, one_row: bool) -> float:
    """Of a tower's blocks; with `one_row` the last one computes the result of one token only."""
    if not one_row or not layers:
        return layers * _block_flops(tokens, tokens, width, mlp_ratio)
    return (layers - 1) * _block_flops(tokens, tokens, width, mlp_ratio) + _block_flops(tokens, 1, width, mlp_ratio)


def _block_flops(tokens: int, rows: int, width: int, mlp_ratio: float) -> float:
    """Keys and values of each token; queries, output and the MLP's two products of each row of the result; attention's two products."""
    return 2 * (2 * tokens + (2 + 2 * mlp_ratio) * rows) * width**2 + 4 * tokens * rows * width


def parameter_counts(state: Mapping[str, Any]) -> dict[str, int]:
    """Parameters of a CLIP state dict: {"image_blocks", "text_blocks", "image_stem", "text_stem", "shared", "total"}.

    Args:
        state: open_clip's names -> shapes or tensors. `shared` is the logit scale and bias; a stem is all of a tower besides its blocks.
    """
    counts = dict.fromkeys(("image_blocks", "text_blocks", "image_stem", "text_stem", "shared"), 0)
    for name, value in state.items():
        size = math.prod(getattr(value, "shape", value))
        if name in ("logit_scale", "logit_bias"):
            counts["shared"] += size
        else:
            tower = "image" if name.startswith("visual.") else "text"
            counts[f"{tower}_{'blocks' if 'transformer.resblocks.' in name else 'stem'}"] += size
    return {**counts, "total": sum(counts.values())}


def first_reached(curve: Curve, target: float, metric: str) -> Mapping[str, Any] | None:
    """Where a run is at `target`: at step 0, where the untrained model is, else at the first of two consecutive evaluations.

    None where there is no such point. A curve that is there in its last evaluation only has not reached it: one evaluation may be luck.
    An untrained model at the target needs no training, so nothing that training does to it afterwards counts.
    """
    if curve[0]["step"] == 0 and reaches(curve[0][metric], target):
        return curve[0]
    for point, following in pairwise(curve):
        if reaches(point[metric], target) and reaches(following[metric], target):
            return point
    return None


def reaches(quality: float, target: float) -> bool:
    """Whether a quality is at a target. Two means of as many hits can differ in their last digit, and neither is then below the other."""
    return quality >= target - 1e-9


@dataclass(frozen=True)
class Paid:
    """What a run had spent at a point of its curve; `reached`: that point is where it reached the target."""

    reached: bool
    flops: float
    seconds: float
    step: float


def charge(curve: Curve, target: float, metric: str) -> Paid:
    """What a run costs up to the target; its full schedule where it never reaches it."""
    point = first_reached(curve, target, metric)
    paid = point if point is not None else curve[-1]
    return Paid(point is not None, paid["flops"], paid["seconds"], paid["step"])


def size_of(entry: DescendantEntry) -> Size:
    """What makes two entries the same size."""
    return entry.image_layers, entry.text_layers, entry.image_width, entry.text_width, entry.modality


def targets(entries: Sequence[DescendantEntry], metric: str) -> dict[Size, float]:
    """Target of each size: what scratch ends with on the validation split, mean over its seeds.

    Args:
        metric: for entries that do not name their own.
    """
    final: dict[Size, list[float]] = defaultdict(list)
    for entry in entries:
        if entry.init == "scratch":
            final[size_of(entry)].append(entry.curve[-1][entry.metric or metric])
    return {size: mean(values) for size, values in final.items()}


def summarise(family: FamilyResult) -> FamilyResult:
    """`family` with each descendant's target and charge, the totals of each initialisation, and the family's ratios.

    Sizes in the sum are those of both towers that have scratch and mmlg entries (and that the recipe does not leave out). Several
    seeds of a size are averaged. A baseline without one of the sizes in the sum has no total and no ratio (None); where the ancestor's
    own cost is unknown, ratios with it are None; `notes` says so. Everything added is derived from the entries: summarising again changes
    nothing.
    """
    metric = family.metric
    wanted = targets(family.descendants, metric)
    entries = [replace(entry, charge=_charge_of(entry, wanted.get(size_of(entry)), metric)) for entry in family.descendants]
    notes: list[str] = []
    sizes = _sizes_in_sum(entries)
    totals: dict[str, Totals | None] = {}
    for init in ("scratch", "mmlg", *BASELINES):
        if any(entry.init == init for entry in entries):
            totals[init] = _totals(family, entries, init, sizes)
            if totals[init] is None and sizes:
                notes.append(f"baseline {init} is missing a size of the sum: its ratio is not defined")
    if not sizes:
        notes.append("no size has both a scratch and an mmlg entry: cost ratios are not defined")
    if family.ancestor.flops is None:
        notes.append(
            "the ancestor's own training cost is unknown (its weights come from elsewhere): ratios with the ancestor are not defined"
        )
    notes.extend(_missed_notes(entries, sizes))
    notes.extend(_grid_notes(entries, sizes))
    notes.extend(_quality_notes(family, entries, sizes))
    summary = Summary(
        num_sizes_in_sum=len(sizes),
        totals_by_init=totals,
        **_cost_ratios(totals),
        break_even_descendants=_break_even(family.ancestor, totals, len(sizes)),
        mean_quality_at_0_over_scratch=_quality_at_0(metric, entries, sizes),
        **_storage_ratios(family, entries),
        notes=notes,
    )
    return replace(family, descendants=entries, summary=summary)


def _charge_of(entry: DescendantEntry, target: float | None, family_metric: str) -> Charge:
    if target is None:
        return Charge(None, None, None, None)
    metric = entry.metric or family_metric
    paid = charge(entry.curve, target, metric)
    # Scratch defines the target; where only its last evaluation is there, the full schedule is its cost, and it did get there.
    reached = paid.reached or (entry.init == "scratch" and reaches(entry.curve[-1][metric], target))
    return Charge(target, reached, paid.flops, paid.seconds)


def _sizes_in_sum(entries: Sequence[DescendantEntry]) -> list[Size]:
    by_size: dict[Size, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.modality == "both" and entry.in_sum is not False:
            by_size[size_of(entry)].add(entry.init)
    return [size for size, inits in by_size.items() if {"scratch", "mmlg"} <= inits]


def _charge(entry: DescendantEntry) -> Charge:
    assert entry.charge is not None, "charged by summarise"
    return entry.charge


def _totals(family: FamilyResult, entries: Sequence[DescendantEntry], init: str, sizes: Sequence[Size]) -> Totals | None:
    """Sums (and means, for quality) over the sizes in the sum; None where a size is missing.

    The ancestor's cached features are charged once to each way that compares with the ancestor.
    """
    groups = [[entry for entry in entries if entry.init == init and size_of(entry) == size] for size in sizes]
    if not groups or not all(groups):
        return None

    def total(value: Callable[[DescendantEntry], float | None]) -> float:
        # Every entry of a size in the sum has a target, and so a charge.
        return sum(mean(found for entry in group if (found := value(entry)) is not None) for group in groups)

    ancestor, learngene = family.ancestor, _learngene(family, init)
    compares = learngene is not None or init == "distil" or (init == "even" and _even_compares(family))
    kept = family.kept_features if compares and init not in WITHOUT_ANCESTOR else None
    once = (learngene.all_flops if learngene else 0) + (kept.flops if kept else 0)
    flops = once + total(lambda entry: _charge(entry).flops_to_target)
    with_ancestor = flops if init in WITHOUT_ANCESTOR else flops + ancestor.flops if ancestor.flops is not None else None
    seconds = total(lambda entry: _charge(entry).seconds_to_target)
    source = learngene.params if learngene else ancestor.params if init == "even" else None
    trained = [group for group in groups if source is None or any(_charge(entry).flops_to_target for entry in group)]
    shipped = sum(mean(entry.params for entry in group) for group in trained)
    shipped += source if source is not None and len(trained) < len(groups) else 0
    at_0 = [entry.metrics_at_0[family.metric] for group in groups for entry in group if entry.metrics_at_0]
    return Totals(
        num_sizes=len(groups),
        num_reached=sum(all(_charge(entry).reached for entry in group) for group in groups),
        flops_once=once,
        flops=flops,
        flops_with_ancestor=with_ancestor,
        seconds=seconds + (learngene.seconds if learngene else 0) + (kept.seconds if kept else 0),
        params_shipped=shipped,
        mean_metric_at_0=mean(at_0) if at_0 else None,
        mean_metric_final=mean(mean(entry.metrics_final[family.metric] for entry in group) for group in groups),
    )


def _even_compares(family: FamilyResult) -> bool:
    """Whether uniform layer selection was trained against the ancestor."""
    return _part(family.recipe, "baselines").get("even_loss") is not None


def _part(recipe: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """A section of the recipe that a file of ours, or a stranger's, has; {} where it has none."""
    found = recipe.get(section)
    return found if isinstance(found, Mapping) else {}


def _learngene(family: FamilyResult, init: str) -> LearngeneEntry | None:
    """The learngene that an initialisation writes from: ours, or that of another method."""
    return family.learngene if init == "mmlg" else family.rival_learngenes.get(init)


def _cost_ratios(totals: Mapping[str, Totals | None]) -> dict[str, Any]:
    """Every ratio is a rival's total divided by ours."""

    def ratio(init: str, cost: Callable[[Totals], float | None]) -> float | None:
        rival, ours = totals.get(init), totals.get("mmlg")
        theirs, mine = (cost(rival), cost(ours)) if rival and ours else (None, None)
        return _divide(theirs, mine) if theirs is not None and mine is not None else None

    def with_ancestor(total: Totals) -> float | None:
        return total.flops_with_ancestor

    baselines = [init for init in BASELINES if init in totals]
    return {
        "cost_ratio": ratio("scratch", lambda total: total.flops),
        "cost_ratio_by_baseline": {init: ratio(init, lambda total: total.flops) for init in baselines},
        "cost_ratio_with_ancestor": ratio("scratch", with_ancestor),
        "cost_ratio_with_ancestor_by_baseline": {init: ratio(init, with_ancestor) for init in baselines},
        "cost_ratio_seconds": ratio("scratch", lambda total: total.seconds),
    }


def _break_even(ancestor: AncestorEntry, totals: Mapping[str, Totals | None], num_sizes: int) -> int | None:
    """The smallest number of average descendants whose savings against scratch pay for ancestor and extraction.

    None: it never does, or the ancestor's cost is unknown.
    """
    scratch, ours = totals.get("scratch"), totals.get("mmlg")
    if not scratch or not ours or ancestor.flops is None:
        return None
    saved = scratch.flops - (ours.flops - ours.flops_once)
    # Multiplied before it is divided, so that whole numbers stay exact.
    return math.ceil((ancestor.flops + ours.flops_once) * num_sizes / saved) if saved > 0 else None


def _missed_notes(entries: Sequence[DescendantEntry], sizes: Sequence[Size]) -> list[str]:
    """Ways that are charged although they do not reach every target: the learngene's ratios then flatter it, a rival's is too small."""
    missed: dict[str, list[bool]] = defaultdict(list)
    for entry in entries:
        if size_of(entry) in sizes:
            missed[entry.init].append(not _charge(entry).reached)
    notes = []
    if num_missed := sum(missed.pop("mmlg", [])):
        num_ours = sum(entry.init == "mmlg" and size_of(entry) in sizes for entry in entries)
        notes.append(
            f"{num_missed} of {num_ours} descendants never reach the target and are charged their whole adaptation: the cost ratios "
            "flatter the learngene. Give adaptation or extraction more steps."
        )
    listed = ", ".join(f"{init} {sum(found)} of {len(found)}" for init, found in sorted(missed.items()) if any(found))
    if listed:
        notes.append(
            f"targets that are never reached: {listed}. Only what was spent is charged, so the ratios of these ways are too small."
        )
    return notes


def _grid_notes(entries: Sequence[DescendantEntry], sizes: Sequence[Size]) -> list[str]:
    """Charges are exact to the distance between evaluations; a reader must know where it is not the same for all."""
    gaps: dict[str, set[float]] = defaultdict(set)
    for entry in entries:
        if size_of(entry) in sizes and len(entry.curve) > 1:
            gaps[entry.init].add(max(following["samples"] - point["samples"] for point, following in pairwise(entry.curve)))
    widest = {init: max(found) for init, found in gaps.items()}
    if len(set(widest.values())) < 2:
        return []
    listed = ", ".join(f"{init} {gap:,}" for init, gap in sorted(widest.items()))
    return [f"evaluations are not equally far apart (samples between two of them: {listed}); a charge is exact to that distance"]


def _quality_at_0(metric: str, entries: Sequence[DescendantEntry], sizes: Sequence[Size]) -> float | None:
    """Mean test metric of descendants before any training, divided by the mean of scratch at its end, over the sizes in the sum."""
    counted = [entry for entry in entries if size_of(entry) in sizes]
    ours = [entry.metrics_at_0[metric] for entry in counted if entry.init == "mmlg" and entry.metrics_at_0]
    theirs = [entry.metrics_final[metric] for entry in counted if entry.init == "scratch"]
    return _divide(mean(ours), mean(theirs)) if ours and theirs else None


def _storage_ratios(family: FamilyResult, entries: Sequence[DescendantEntry]) -> dict[str, Any]:
    """At equal precision and counting every parameter; the report shows the file's own bytes beside them.

    Files that do not say how much of the ancestor are blocks are of learngenes that hold its stems and logit scale whole, unless the
    recipe stores the token embedding factorised.
    """
    learngene, ancestor = family.learngene, family.ancestor.params
    blocks = family.ancestor.block_params
    if blocks is None and _part(family.recipe, "extraction").get("embedding_rank") is None:
        blocks = ancestor - learngene.stem_params
    written = {size_of(entry): entry.params for entry in entries if entry.init == "mmlg"}  # seeds of a size are one descendant
    return {
        "storage_ratio_ancestor": learngene.params / ancestor,
        "storage_ratio_family": _divide(learngene.params, sum(written.values())),
        "storage_share_blocks": learngene.block_params / ancestor,
        "storage_share_stems": learngene.stem_params / ancestor,
        "storage_ratio_blocks": _divide(learngene.block_params, blocks) if blocks is not None else None,
        "storage_ratio_stems": _divide(learngene.stem_params, ancestor - blocks) if blocks is not None else None,
    }


def chance(metric: str, split: SplitSize) -> float | None:
    """What random scores give on a split: the probability that a right answer is among k candidates drawn without replacement.

    None for a metric that is not recall or accuracy.
    """
    kind, _, number = metric.rpartition("@") if "@" in metric else (metric[:3], "", metric[3:])
    if not (number.isdecimal() and len(number) < 4) or (not split.captions and "recall" in kind):
        return None
    if kind == "acc":
        return min(1.0, int(number) / split.classes) if split.classes else None
    if not kind.endswith("recall"):
        return None
    k, per_image = int(number), max(1, round(split.captions / split.images))
    of_image = min(1.0, k / split.images)
    of_text = 1 - math.comb(max(0, split.captions - per_image), k) / math.comb(max(k, split.captions), k)
    return {"image_retrieval_recall": of_image, "text_retrieval_recall": of_text}.get(kind, (of_image + of_text) / 2)


def standard_error(metric: str, value: float, split: SplitSize) -> float | None:
    """Of a fraction over the split's queries: sqrt(p (1 - p) / n); the mean of both directions takes them as independent.

    None where the number of queries is not known.
    """
    spread = math.sqrt(max(0.0, value * (1 - value)))
    if metric.startswith("image_retrieval"):
        return spread / math.sqrt(split.captions)
    if metric.startswith(("text_retrieval", "acc")):
        return spread / math.sqrt(split.images)
    return spread * math.sqrt(1 / split.captions + 1 / split.images) / 2 if metric.startswith("mean_recall") else None


def _quality_notes(family: FamilyResult, entries: Sequence[DescendantEntry], sizes: Sequence[Size]) -> list[str]:
    """Where a quality is not what a reader takes it for: targets near chance, training that hurts, depth that hurts."""
    notes, counted = [], [entry for entry in entries if size_of(entry) in sizes]
    split = (family.splits or {}).get("val")
    if split is not None:
        near = []
        for entry in counted:
            level, target = chance(entry.metric or family.metric, split), _charge(entry).target
            error = standard_error(entry.metric or family.metric, level, split) if level is not None else None
            if entry.init == "scratch" and level is not None and error is not None and target is not None and target < level + 3 * error:
                near.append(entry.name)
        if near:
            notes.append(f"targets within three standard errors of chance, so that their charges say nothing: {', '.join(near)}")
    for init in ("mmlg", *BASELINES):
        worse = [e.name for e in counted if e.init == init and e.curve[0]["step"] == 0 and _last(e, family) < _first(e, family)]
        if worse:
            notes.append(f"training leaves these worse than they were untrained: {', '.join(worse)}")
    scratch = sorted((entry for entry in counted if entry.init == "scratch"), key=lambda entry: entry.params)
    equal = [entry for entry in scratch if entry.image_width == scratch[-1].image_width and entry.text_width == scratch[-1].text_width]
    fallen = [
        f"{more.name} below {less.name}"
        for less, more in pairwise(equal)
        if less.seed == more.seed and _last(more, family) < _last(less, family)
    ]
    if fallen:
        notes.append(f"scratch does not gain by depth, so its larger targets are weak: {', '.join(fallen)}")
    return notes


def _first(entry: DescendantEntry, family: FamilyResult) -> float:
    return entry.curve[0][entry.metric or family.metric]


def _last(entry: DescendantEntry, family: FamilyResult) -> float:
    return entry.curve[-1][entry.metric or family.metric]


def _divide(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None

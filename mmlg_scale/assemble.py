"""What a family's complete steps come to: family.json's content, and the examples of retrieval."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmlg_scale.accounting import BYTES_PER_PARAMETER, summarise
from mmlg_scale.data.corpus import PairSet, pairs_of
from mmlg_scale.data.summary import num_pairs
from mmlg_scale.evaluation.evaluate import folder_features
from mmlg_scale.hardware import device_name
from mmlg_scale.recipe_file import to_content
from mmlg_scale.records import write_record
from mmlg_scale.report import retrieval_samples
from mmlg_scale.results import FORMAT_VERSION, POINT_KEYS, FamilyResult
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.folder import RESULT_FILE, result_of
from mmlg_scale.training.roles import DescendantRole

if TYPE_CHECKING:
    from mmlg_scale.family import Plan

LEARNGENE_KEYS = ("params", "bytes", "block_params", "stem_params", "flops", "teacher_flops", "seconds", "metrics", "curve")


def assemble(plan: Plan) -> FamilyResult:
    """family.json's content from the steps' results: of the recipe's members, whatever else is in the folder."""
    settings = plan.settings
    ancestor, extracted = _result(plan.ancestor), _result(plan.extracted("mmlg"))
    cost = {key: ancestor[key] for key in ("flops", "seconds")}
    if settings.model.weights is not None:
        cost = _cost_of_weights(Path(settings.model.weights))
    family = {
        "format_version": FORMAT_VERSION,
        "metric": settings.evaluation.metric,
        "ancestor": {
            **{key: ancestor[key] for key in ("params", "metrics", "image_layers", "text_layers", "curve")},
            **cost,
            "num_bytes": BYTES_PER_PARAMETER * ancestor["params"],
            "block_params": ancestor.get("block_params"),
        },
        "kept_features": extracted["kept_features"],
        "splits": _split_sizes(pairs_of(plan.settings.data)),
        "learngene": _learngene(plan, "mmlg"),
        "rival_learngenes": {method: _learngene(plan, method) for method in plan.rivals()},
        "descendants": [_entry(member.step.folder, member.role) for member in plan.members if isinstance(member.role, DescendantRole)],
        "environment": environment(plan.runtime) | _measured_on([_result(member.step.folder) for member in plan.members if member.role]),
        "recipe": to_content(plan.given, plan.runtime),
    }
    return summarise(FamilyResult.from_json(family, "family.json"))


def _measured_on(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Device and cores that the runs say they had, which need not be those of the machine that draws the report."""
    found = {}
    for key in ("device", "cores"):
        values = list(dict.fromkeys(result[key] for result in results if key in result))
        if values:
            found[key] = values[0] if len(values) == 1 else ", ".join(map(str, values))
    return found


def _result(folder: Path) -> dict[str, Any]:
    found = result_of(folder)
    assert found is not None, folder
    return found


def _learngene(plan: Plan, method: str) -> dict[str, Any]:
    """A learngene as it ends, and what all of its training cost: a continuation's curve begins where the extraction's ends."""
    found = {key: _result(plan.learngene(method))[key] for key in LEARNGENE_KEYS}
    if plan.learngene(method) == plan.extracted(method):
        return found
    before = _result(plan.extracted(method))
    spent = {key: before[key] for key in ("flops", "teacher_flops", "seconds")}
    end = before["curve"][-1]
    later = [point | {key: point[key] + end[key] for key in POINT_KEYS} for point in found["curve"]]
    return found | {key: found[key] + value for key, value in spent.items()} | {"curve": [*before["curve"], *later]}


def _split_sizes(pairs: PairSet) -> dict[str, dict[str, int | None]]:
    """What recall and accuracy were measured among."""
    classes, found = pairs.classes, {}
    for split in ("val", "test"):
        images, captions = num_pairs(pairs.root / split, pairs.store)
        found[split] = {"images": images, "captions": captions, "classes": len(classes["classnames"]) if classes else None}
    return found


def _cost_of_weights(weights: Path) -> dict[str, Any]:
    """What training the weights cost: known where they are the model of a finished run of ours that began at random weights.

    Unknown of what was only read by its run, and of what came out of another model.
    """
    run = weights.parent if weights.is_dir() else weights
    result = result_of(run) if (run / RESULT_FILE).is_file() else None
    is_whole = result is not None and (result.get("role") == "ancestor" or result.get("init") == "scratch") and result.get("steps", 0) > 0
    return {key: result.get(key) if result is not None and is_whole else None for key in ("flops", "seconds")}


def _entry(folder: Path, role: DescendantRole) -> dict[str, Any]:
    run = _result(folder)
    return {
        "name": folder.name,
        **{key: run[key] for key in ("image_layers", "text_layers", "image_width", "text_width", "params", "init", "seed")},
        "modality": role.size.modality,
        "in_sum": role.size.in_sum,
        "metrics_at_0": run["metrics_at_0"],
        "metrics_final": run["metrics"],
        "metric": role.settings.evaluation.metric,
        "steps": run["steps"],
        "flops": run["flops"] + run["teacher_flops"],
        "seconds": run["seconds"],
        "curve": run["curve"],
    }


def environment(runtime: Runtime) -> dict[str, Any]:
    """What the figures were measured on: processor, cores, versions. No host name."""
    from importlib.metadata import version

    packages = ("torch", "deepspeed", "open_clip_torch", "mmlg-scale")
    return {
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_rank": runtime.threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def draw_samples(plan: Plan) -> None:
    """retrieval_samples.json: what the middle descendant finds in the test split."""
    sizes = sorted((s for s in plan.settings.family.sizes if s.modality == "both"), key=lambda s: s.image_layers + s.text_layers)
    if not sizes:
        return
    folder = plan.descendant(sizes[len(sizes) // 2], "mmlg") / "model"
    image_ND, text_MD, split = folder_features(folder, pairs_of(plan.settings.data), "test")
    if not len(text_MD):  # a split of images and labels
        return
    samples = retrieval_samples(image_ND, text_MD, split.text_to_image_M, split.captions, split.image_png, num_image_queries=4)
    write_record(plan.out / "retrieval_samples.json", {"samples": samples})

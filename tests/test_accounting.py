"""Charges and ratios against sums done by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmlg_scale.accounting import (
    Paid,
    chance,
    charge,
    first_reached,
    size_of,
    standard_error,
    targets,
)
from mmlg_scale.accounting import summarise as summarise_typed
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.retrieval import recall_at_k
from mmlg_scale.results import INITS, DescendantEntry, FamilyResult, RunResult, SplitSize


def _curve(*values: float, step: int = 10, start: int = 1, flops: int = 100, seconds: float = 2.0) -> list[dict[str, Any]]:
    """Evaluations every `step` steps; FLOPs and seconds grow by the given amounts per evaluation."""
    return [
        {"step": step * n, "samples": step * n, "flops": flops * n, "seconds": seconds * n, "q": value}
        for n, value in enumerate(values, start=start)
    ]


@pytest.mark.parametrize(
    ("values", "start", "expected_step"),
    [
        ((0.1, 0.5, 0.6, 0.7), 1, 20),  # exactly the target counts
        ((0.1, 0.5, 0.4, 0.6, 0.7), 1, 40),  # a lone evaluation does not
        ((0.1, 0.2, 0.3, 0.9), 1, None),  # nor does only the last one
        ((0.6, 0.6), 0, 0),  # there before any training
        ((0.6, 0.4, 0.6, 0.6), 0, 0),  # also where training first makes it worse
        ((0.4, 0.6, 0.4, 0.6, 0.6), 0, 30),
        ((0.6,), 0, 0),  # an untrained descendant: nothing to wait for
        ((0.4,), 0, None),
        ((0.6,), 1, None),  # one evaluation after training is a lone evaluation
        ((float("nan"), 0.6, float("nan"), 0.6), 1, None),
        ((0.5 - 2**-53, 0.5 - 2**-53), 0, 0),  # as many hits, another last digit
        ((0.4, 0.5 - 2**-53, 0.5), 0, 10),
        ((0.4999, 0.4999), 0, None),
    ],
)
def test_first_reached(values: tuple[float, ...], start: int, expected_step: int | None) -> None:
    point = first_reached(_curve(*values, start=start), 0.5, "q")
    assert (None if point is None else point["step"]) == expected_step


def test_charge_is_the_full_schedule_where_the_target_is_not_reached() -> None:
    assert charge(_curve(0.1, 0.5, 0.6, 0.7), 0.5, "q") == Paid(reached=True, flops=200, seconds=4.0, step=20)
    assert charge(_curve(0.1, 0.2, 0.3, 0.9), 0.5, "q") == Paid(reached=False, flops=400, seconds=8.0, step=40)


def _entry(init: str, layers: int | None, values: tuple[float, ...], **changes: Any) -> dict[str, Any]:
    entry = {
        "name": f"i{layers}-{init}",
        "image_layers": layers,
        "text_layers": layers,
        "image_width": 64,
        "text_width": 64,
        "modality": "both",
        "params": 1000 * (layers or 0),
        "init": init,
        "seed": 0,
        "metrics_at_0": {"q": values[0]} if init in ("mmlg", "even", "tleg") else None,
        "metrics_final": {"q": values[-1]},
        "metric": "q",
    }
    curve = changes.pop("flops", 100), changes.pop("seconds", 2.0)
    start = 0 if init in ("mmlg", "even", "tleg") else 1
    return {**entry, "curve": _curve(*values, start=start, flops=curve[0], seconds=curve[1]), **changes}


def summarise(family: dict[str, Any]) -> dict[str, Any]:
    return summarise_typed(FamilyResult.from_json(family, "family.json")).to_json()


def _typed(entries: list[dict[str, Any]]) -> list[DescendantEntry]:
    return [DescendantEntry.from_json(entry, "entry") for entry in entries]


def _family(*entries: dict[str, Any]) -> dict[str, Any]:
    return {
        "metric": "q",
        "ancestor": {"params": 20_000, "flops": 3000, "seconds": 60.0, "metrics": {"q": 0.7}},
        "learngene": {
            "params": 4000,
            "bytes": 16_100,
            "block_params": 3000,
            "stem_params": 1000,
            "flops": 150,
            "teacher_flops": 50,
            "seconds": 7.0,
        },
        "descendants": list(entries),
        "environment": {},
        "recipe": {},
    }


def _two_sizes() -> list[dict[str, Any]]:
    """Targets 0.4 (two layers) and 0.5 (four layers).

    scratch: 400 FLOPs, 8 s (only its last evaluation is there) and 600 FLOPs, 12 s (reached at the second of four evaluations).
    mmlg: 0 and 0 s (there at step 0) and 20 FLOPs, 1 s (there after one step's evaluation).
    """
    return [
        _entry("scratch", 2, (0.1, 0.2, 0.3, 0.4)),
        _entry("scratch", 4, (0.2, 0.5, 0.6, 0.5), flops=300, seconds=6.0),
        _entry("mmlg", 2, (0.5, 0.6, 0.7), flops=20, seconds=1.0),
        _entry("mmlg", 4, (0.4, 0.6, 0.7), flops=20, seconds=1.0),
    ]


def test_targets_are_means_over_seeds_in_each_entrys_own_metric() -> None:
    entries = [_entry("scratch", 2, (0.1, 0.3)), _entry("scratch", 2, (0.1, 0.5), seed=1), _entry("mmlg", 2, (0.9,))]
    assert targets(_typed(entries), "unused") == {size_of(_typed(entries)[0]): pytest.approx(0.4)}
    for entry in entries:
        del entry["metric"]
    assert targets(_typed(entries), "q") == {size_of(_typed(entries)[0]): pytest.approx(0.4)}


def test_cost_ratios_by_hand() -> None:
    family = summarise(_family(*_two_sizes()))
    assert family["num_sizes_in_sum"] == 2
    by_name = {entry["name"]: entry for entry in family["descendants"]}
    charged = {name: (entry["target"], entry["reached"], entry["flops_to_target"]) for name, entry in by_name.items()}
    assert charged == {
        "i2-scratch": (0.4, True, 400),
        "i4-scratch": (0.5, True, 600),
        "i2-mmlg": (0.4, True, 0),
        "i4-mmlg": (0.5, True, 20),
    }
    assert family["cost_ratio"] == pytest.approx(1000 / (200 + 20))
    assert family["cost_ratio_with_ancestor"] == pytest.approx(1000 / (3000 + 200 + 20))
    assert family["cost_ratio_seconds"] == pytest.approx((8 + 12) / (7 + 1))
    # n * 500 >= 3000 + 200 + n * 10 from n = 3200 / 490 = 6.53
    assert family["break_even_descendants"] == 7
    assert family["mean_quality_at_0_over_scratch"] == pytest.approx(0.45 / 0.45)
    assert family["totals_by_init"]["mmlg"] == {
        "num_sizes": 2,
        "num_reached": 2,
        "flops_once": 200,
        "flops": 220,
        "flops_with_ancestor": 3220,
        "seconds": 8.0,
        "params_shipped": 4000 + 4000,  # the file, and the size of four layers, which is trained
        "mean_metric_at_0": pytest.approx(0.45),
        "mean_metric_final": pytest.approx(0.7),
    }
    assert family["totals_by_init"]["scratch"]["params_shipped"] == 6000
    assert family["totals_by_init"]["scratch"]["flops_with_ancestor"] == 1000  # scratch needs no ancestor
    assert family["notes"] == []


def test_break_even_is_the_smallest_whole_number() -> None:
    entries = _two_sizes()
    family = _family(*entries)
    family["ancestor"]["flops"] = 980 - 200  # 2 * 490: exactly two descendants pay for it
    assert summarise(family)["break_even_descendants"] == 2
    family["ancestor"]["flops"] += 1
    assert summarise(family)["break_even_descendants"] == 3


def test_never_breaks_even_where_adaptation_costs_more_than_scratch() -> None:
    entries = [_entry("scratch", 2, (0.4, 0.4)), _entry("mmlg", 2, (0.1, 0.1, 0.1), flops=1000)]
    family = summarise(_family(*entries))
    assert family["break_even_descendants"] is None
    assert family["cost_ratio"] == pytest.approx(100 / 2200)  # charged in full, and marked
    assert [entry["reached"] for entry in family["descendants"]] == [True, False]
    assert family["totals_by_init"]["mmlg"]["num_reached"] == 0
    assert "1 of 1 descendants never reach the target" in family["notes"][0]


def test_baselines_pay_for_the_ancestor_too() -> None:
    even = [_entry("even", 2, (0.3, 0.4, 0.5), flops=40), _entry("even", 4, (0.3, 0.4, 0.45), flops=40)]
    untrained = [_entry("even", 2, (0.4, 0.4)), even[1]]
    shipped = summarise(_family(*_two_sizes(), *untrained))["totals_by_init"]["even"]["params_shipped"]
    assert shipped == 20_000 + 4000  # the whole ancestor for the size that is not trained
    family = summarise(_family(*_two_sizes(), *even))
    # Reached at its second evaluation (40) and never reached (its whole schedule, 80).
    assert family["cost_ratio_by_baseline"] == {"even": pytest.approx(120 / 220)}
    assert family["cost_ratio_with_ancestor_by_baseline"] == {"even": pytest.approx(3120 / 3220)}
    assert family["totals_by_init"]["even"]["params_shipped"] == 2000 + 4000  # both are trained
    assert family["totals_by_init"]["even"]["num_reached"] == 1
    assert "targets that are never reached: even 1 of 2. Only what was spent is charged" in family["notes"][0]


def test_a_baseline_without_a_size_has_no_ratio() -> None:
    family = summarise(_family(*_two_sizes(), _entry("distil", 2, (0.4, 0.4))))
    assert family["cost_ratio_by_baseline"] == {"distil": None}
    assert family["totals_by_init"]["distil"] is None
    assert family["notes"] == ["baseline distil is missing a size of the sum: its ratio is not defined"]
    assert family["cost_ratio"] == pytest.approx(1000 / 220)


def test_only_sizes_of_both_towers_with_both_sides_are_in_the_sum() -> None:
    alone = [
        _entry("mmlg", 9, (0.9,)),  # no scratch
        _entry("scratch", 8, (0.9, 0.9)),  # no mmlg
        _entry("mmlg", 4, (0.9,), modality="image", text_layers=None, text_width=None),
        _entry("scratch", 4, (0.9, 0.9), modality="image", text_layers=None, text_width=None),
        _entry("mmlg", 6, (0.9,), in_sum=False),
        _entry("scratch", 6, (0.9, 0.9), in_sum=False),
    ]
    family = summarise(_family(*_two_sizes(), *alone))
    assert family["num_sizes_in_sum"] == 2
    assert family["cost_ratio"] == pytest.approx(1000 / 220)
    by_name = {(entry["name"], entry["modality"]): entry for entry in family["descendants"]}
    assert by_name["i9-mmlg", "both"]["target"] is None
    assert by_name["i4-scratch", "image"]["target"] == pytest.approx(0.9)  # its own target, apart from the sum


def test_widths_make_sizes_differ() -> None:
    narrow = _entry("mmlg", 2, (0.9,), image_width=32, text_width=32)
    family = summarise(_family(_entry("scratch", 2, (0.4, 0.4)), narrow))
    assert family["cost_ratio"] is None
    assert family["notes"] == ["no size has both a scratch and an mmlg entry: cost ratios are not defined"]


def test_unequal_grids_are_noted() -> None:
    entries = _two_sizes()
    for entry in entries:
        if entry["init"] == "mmlg":
            entry["curve"] = [{**point, "samples": 4 * point["samples"]} for point in entry["curve"]]
    assert summarise(_family(*entries))["notes"] == [
        "evaluations are not equally far apart (samples between two of them: mmlg 40, scratch 10); a charge is exact to that distance"
    ]


@pytest.mark.parametrize("metric", ["image_retrieval_recall@5", "text_retrieval_recall@5", "mean_recall@1", "acc1", "acc5"])
def test_chance_and_standard_errors_agree_with_random_scores(metric: str) -> None:
    images, per_image, classes, repeats = 30, 4, 12, 400
    split = SplitSize(images, images * per_image, classes)
    generator = torch.Generator().manual_seed(0)
    owner_M = torch.arange(images).repeat_interleave(per_image)
    found = []
    for _ in range(repeats):
        if metric.startswith("acc"):
            scores_NC = torch.rand(images, classes, generator=generator)
            labels_N = torch.randint(classes, (images, 1), generator=generator)
            found.append((scores_NC.topk(int(metric[3:])).indices == labels_N).any(dim=1).double().mean().item())
        else:
            image_ND, text_MD = (torch.randn(n, 64, generator=generator) for n in (images, images * per_image))
            found.append(recall_at_k(image_ND, text_MD, owner_M)[metric])
    values = torch.tensor(found, dtype=torch.float64)
    level = chance(metric, split)
    assert level is not None
    assert level == pytest.approx(values.mean().item(), abs=4 * values.std().item() / repeats**0.5)
    # Queries of one image share their candidates, so the formula is near, not exact.
    assert standard_error(metric, level, split) == pytest.approx(values.std().item(), rel=0.3)


def test_metrics_without_a_chance_level_have_none() -> None:
    split = SplitSize(10, 20)
    assert (chance("acc1", split), chance("mean_per_class_recall", split), standard_error("mean_per_class_recall", 0.5, split)) == (
        None,
    ) * 3
    assert chance("text_retrieval_recall@10", SplitSize(3, 6)) == 1.0


def test_weak_targets_and_training_that_hurts_are_noted() -> None:
    entries = _two_sizes()
    entries[1]["curve"] = _curve(0.2, 0.3, 0.39, start=1, flops=300, seconds=6.0)  # four layers below two layers' 0.4
    entries[2]["curve"] = _curve(0.5, 0.45, start=0, flops=20, seconds=1.0)
    assert summarise(_family(*entries))["notes"] == [
        "training leaves these worse than they were untrained: i2-mmlg",
        "scratch does not gain by depth, so its larger targets are weak: i4-scratch below i2-scratch",
    ]
    near = []
    for entry in _two_sizes():
        curve = [{**{k: v for k, v in point.items() if k != "q"}, "mean_recall@1": point["q"]} for point in entry["curve"]]
        final = {"mean_recall@1": 0.5}
        near.append({**entry, "metric": "mean_recall@1", "curve": curve, "metrics_at_0": final, "metrics_final": final})
    family = _family(*near) | {"metric": "mean_recall@1", "splits": {"val": {"images": 5, "captions": 5}}}
    family["ancestor"]["metrics"] = {"mean_recall@1": 0.7}
    # Chance is 0.2, its standard error sqrt(0.2 * 0.8 * 2 / 5) / 2 = 0.126: 0.5 is below 0.2 + 3 * 0.126 and 0.4 too.
    assert "three standard errors of chance, so that their charges say nothing: i2-scratch, i4-scratch" in summarise(family)["notes"][0]
    family["splits"]["val"] = {"images": 50, "captions": 50}
    assert summarise(family)["notes"] == []


def test_seeds_of_a_size_are_averaged() -> None:
    entries = [
        _entry("scratch", 2, (0.2, 0.4, 0.4)),
        _entry("scratch", 2, (0.2, 0.4, 0.6), seed=1),
        _entry("mmlg", 2, (0.5, 0.6), flops=60),
        _entry("mmlg", 2, (0.4, 0.5, 0.6), seed=1, flops=60),
    ]
    family = summarise(_family(*entries))
    # Target 0.5: the first seed never gets there and the second only at its last evaluation: 300 each. Ours: 0 and 60.
    assert [entry["reached"] for entry in family["descendants"]] == [False, True, True, True]
    assert family["cost_ratio"] == pytest.approx(300 / (200 + 30))


def test_storage_by_hand() -> None:
    tower = _entry("mmlg", 2, (0.9,), modality="image", params=500, text_layers=None, text_width=None)
    family = summarise(_family(*_two_sizes(), _entry("mmlg", 4, (0.4, 0.6), seed=1), tower))
    assert family["storage_ratio_ancestor"] == pytest.approx(4000 / 20_000)
    assert family["storage_ratio_family"] == pytest.approx(4000 / (2000 + 4000 + 500))
    assert family["storage_share_blocks"] == pytest.approx(3000 / 20_000)
    assert family["storage_share_stems"] == pytest.approx(1000 / 20_000)
    assert family["storage_ratio_blocks"] == pytest.approx(3000 / 19_000)


def test_summarising_again_changes_nothing_and_leaves_its_input_alone() -> None:
    raw = FamilyResult.from_json(_family(*_two_sizes(), _entry("even", 2, (0.3, 0.4, 0.5))), "raw")
    before = copy.deepcopy(raw)
    once = summarise_typed(raw)
    assert raw == before
    assert summarise_typed(once) == once
    assert summarise(once.to_json()) == once.to_json()


def test_another_methods_learngene_is_charged_its_own_extraction() -> None:
    """TLEG: 300 once, 0 and 40 FLOPs of adaptation; it ships its own file."""
    tleg = [_entry("tleg", 2, (0.5, 0.6)), _entry("tleg", 4, (0.4, 0.6, 0.7), flops=40)]
    family = _family(*_two_sizes(), *tleg)
    family["rival_learngenes"] = {"tleg": {**family["learngene"], "params": 5000, "flops": 200, "teacher_flops": 100, "seconds": 9.0}}
    found = summarise(family)
    assert found["totals_by_init"]["tleg"]["flops_once"] == 300
    assert found["totals_by_init"]["tleg"]["params_shipped"] == 5000 + 4000
    assert found["cost_ratio_by_baseline"] == {"tleg": pytest.approx((300 + 0 + 40) / (200 + 20))}


def test_kept_features_are_charged_once_to_each_way_that_compares_with_the_ancestor() -> None:
    others = [_entry(init, layers, (0.5, 0.6, 0.6)) for init in ("even", "distil") for layers in (2, 4)]
    plain, kept = (summarise(_family(*_two_sizes(), *others) | extra)["totals_by_init"] for extra in ({}, {"kept_features": KEPT}))
    more = {init: (kept[init]["flops"] - plain[init]["flops"], kept[init]["seconds"] - plain[init]["seconds"]) for init in plain}
    assert more == {"scratch": (0, 0), "mmlg": (30, 0.5), "even": (0, 0), "distil": (30, 0.5)}


KEPT = {"flops": 30, "seconds": 0.5}


def test_the_json_is_that_of_the_version_before_the_schema() -> None:
    """Written by accounting.summarise when it took and gave dictionaries: six ways, two seeds, a single tower, a size left out."""
    golden = json.loads((Path(__file__).parent / "family_golden.json").read_text())
    found = summarise(golden["before"])
    assert found == golden["after"]
    assert list(found) == list(golden["after"])
    assert {entry["init"] for entry in golden["after"]["descendants"]} >= {"scratch", "mmlg", "even", "distil", "tleg"}


def test_blocks_and_stems_are_of_the_ancestors_own() -> None:
    """A factorised embedding: stems of 1,000 where the ancestor has 5,000. Files without the ancestor's blocks do not say."""
    family = _family(*_two_sizes())
    family["ancestor"]["block_params"] = 15_000
    found = summarise(family)
    assert (found["storage_ratio_blocks"], found["storage_ratio_stems"]) == (pytest.approx(3000 / 15_000), pytest.approx(1000 / 5000))
    for recipe, known in (({}, True), ({"extraction": {"embedding_rank": 12}}, False), ({"extraction": []}, True)):
        found = summarise(_family(*_two_sizes()) | {"recipe": recipe})
        assert (found["storage_ratio_blocks"] is not None) is (found["storage_ratio_stems"] == 1) is known


def test_an_ancestor_of_unknown_cost_has_no_ratios_with_it() -> None:
    even = [_entry("even", 2, (0.3, 0.4, 0.5), flops=40), _entry("even", 4, (0.3, 0.4, 0.45), flops=40)]
    known, unknown = _family(*_two_sizes(), *even), _family(*_two_sizes(), *even)
    unknown["ancestor"] |= {"flops": None, "seconds": None}
    before, found = summarise(known), summarise(unknown)
    assert (found["cost_ratio_with_ancestor"], found["break_even_descendants"]) == (None, None)
    assert found["cost_ratio_with_ancestor_by_baseline"] == {"even": None}
    with_ancestor = {init: total["flops_with_ancestor"] for init, total in found["totals_by_init"].items()}
    assert with_ancestor == {"scratch": 1000, "mmlg": None, "even": None}  # scratch needs none
    for key in ("cost_ratio", "cost_ratio_by_baseline", "cost_ratio_seconds", "storage_ratio_ancestor"):
        assert found[key] == before[key]
    unknown_cost = "the ancestor's own training cost is unknown (its weights come from elsewhere): ratios with the ancestor are not defined"
    assert found["notes"] == [unknown_cost, *before["notes"]]


RUN = {
    "role": "descendant",
    "init": "mmlg",
    "size": {"image_layers": 2, "text_layers": 2, "modality": "both"},
    "seed": 0,
    "steps": 10,
    "stopped_early": True,
    "flops": 70,
    "teacher_flops": 30,
    "kept_features": {"flops": 5, "seconds": 0.5},
    "seconds": 1.5,
    "metrics": {"q": 0.5},
    "metrics_at_0": None,
    "curve": [{"step": 10, "samples": 80, "flops": 100, "seconds": 1.5, "q": 0.5}],
    "image_layers": 2,
    "text_layers": None,
    "params": 12,
}


def test_a_runs_result_is_read_and_written_unchanged() -> None:
    run = RunResult.from_json(RUN, "result.json")
    assert (run.flops + run.teacher_flops, run.kept_features.flops, run.size) == (100, 5, RUN["size"])  # type: ignore[union-attr]
    assert run.to_json() == RUN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 1.5}, "steps is not a whole number"),
        ({"steps": True}, "steps is not a whole number"),
        ({"flops": "many"}, "flops is not a number"),
        ({"seconds": float("inf")}, "seconds is not a finite number"),
        ({"metrics": {"q": float("nan")}}, "metrics.q is not a finite number"),
        ({"metrics": [0.5]}, "metrics is not an object"),
        ({"curve": {}}, "curve is not a list"),
        ({"curve": [{"step": 1}]}, r"curve\[0\].samples is missing"),
        ({"curve": [RUN["curve"][0], {**RUN["curve"][0], "q": None}]}, r"curve\[1\].q is not a number"),  # type: ignore[index]
        ({"kept_features": {"flops": 5}}, "kept_features.seconds is missing"),
        ({"stopped_early": 1}, "stopped_early is not true or false"),
        ({"role": None}, "role is not text"),
        ({"init": "magic"}, f"init: 'magic' is not one of {', '.join(INITS)}"),
    ],
)
def test_what_a_result_misses_is_one_line_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^/run/result\.json is damaged: {message}\. Remove") as raised:
        RunResult.from_json(RUN | change, "/run/result.json")
    assert "\n" not in str(raised.value)


def test_another_format_is_refused() -> None:
    with pytest.raises(UserError, match=r"^family\.json: format_version 2 is not supported, 1 is\."):
        FamilyResult.from_json({"format_version": 2}, "family.json")

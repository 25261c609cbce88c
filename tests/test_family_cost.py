"""The family-cost benchmark: arithmetic on curves made by hand, the committed ratios from the raw curves, a run at the smallest size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import family_cost, family_frontier
from benchmarks.family_cost import run_seed, this_machine, tuned_settings
from benchmarks.family_frontier import Cost, Seed
from benchmarks.family_plan import LEARNGENES, RESULTS, Pieces, Plan, load_plan, size_name

PLAN = Plan(
    name="hand",
    recipe="demo",
    metric="q",
    families={"two": [[2, 2], [4, 4]]},
    methods={},
    marks=["long"],
    tuning={},
)


def curve(*points: tuple[float, float], batch: int = 10) -> list[dict[str, float]]:
    """Points of (FLOPs, quality), ten steps apart."""
    return [{"step": 10 * i, "samples": 10 * i * batch, "flops": flops, "seconds": 0.0, "q": q} for i, (flops, q) in enumerate(points)]


def piece(method: str, schedule: str, points: list[dict[str, float]], teacher: float = 0.0, **more: Any) -> dict[str, Any]:
    """A trained model's entry; `teacher` is contained in the curve's FLOPs."""
    figures = {"method": method, "schedule": schedule, "curve": points, "test": {"q": points[-1]["q"]}, "params": 100}
    return {**figures, "teacher_flops": teacher, "flops": points[-1]["flops"] - teacher, **more}


def seed_of(**pieces: dict[str, Any]) -> Seed:
    ancestor = piece("ancestor", "whole", curve((0, 0.0), (1000, 0.9)), params=400)
    return Seed(PLAN, {"ancestor": ancestor} | {name.replace("_", "/"): found for name, found in pieces.items()})


def both(target: float) -> dict[tuple[int, ...], float]:
    return {(2, 2): target, (4, 4): target}


def test_separate_methods_take_the_cheapest_schedule_of_each_size() -> None:
    seed = seed_of(
        **{
            "scratch_long_i2-t2": piece("scratch", "long", curve((10, 0.1), (20, 0.5), (30, 0.6))),
            "scratch_long_i4-t4": piece("scratch", "long", curve((20, 0.2), (40, 0.6), (60, 0.7))),
            "scratch_short_i2-t2": piece("scratch", "short", curve((5, 0.2), (15, 0.55))),
            "scratch_short_i4-t4": piece("scratch", "short", curve((10, 0.2), (30, 0.4))),
        }
    )
    assert seed.cost("scratch", "two", both(0.5)) == Cost(15 + 40, 2)  # short's end for the small one, long's middle for the large one
    assert seed.cost("scratch", "two", both(0.65)) == Cost(None, 1)
    assert seed.cost("distil", "two", both(0.5)) is None
    assert seed.cost("scratch", "two", {(2, 2): 0.5, (4, 4): 0.4}) == Cost(15 + 30, 2)


def test_one_lucky_evaluation_on_the_way_is_not_a_target_reached() -> None:
    points = curve((10, 0.1), (20, 0.9), (30, 0.3), (40, 0.8), (50, 0.85))
    assert family_frontier.reaching(points, 0.8, "q") == points[3]
    assert family_frontier.reaching(points, 0.9, "q") is None
    assert family_frontier.reaching(points[:4], 0.8, "q") == points[3]  # the end of the schedule


def test_joint_distillation_charges_one_teacher_until_the_last_size_is_there() -> None:
    # The teacher is 5 of each 10 (small) or 20 (large) FLOPs a point.
    seed = seed_of(
        **{
            "distil_long_i2-t2": piece("distil", "long", curve((0, 0.0), (10, 0.5), (20, 0.6)), teacher=10.0),
            "distil_long_i4-t4": piece("distil", "long", curve((0, 0.0), (20, 0.3), (40, 0.7)), teacher=10.0),
        }
    )
    assert seed.cost("distil", "two", both(0.5)) == Cost(10 + 40, 2)
    assert seed.cost("distil_joint", "two", both(0.5)) == Cost((10 - 5) + (40 - 10) + 10, 2)
    rows = {row["way"]: row["flops"] for row in family_frontier.ends(seed, "two")}
    assert rows == {"distil": 60.0, "distil_joint": 60.0 - 10.0}


def test_by_the_mean_all_sizes_are_trained_equally_long() -> None:
    """No size decides: two sizes at 0.5 and 0.7 are at 0.6, as scratch's are. A learngene is charged whole, and nothing is adapted."""
    seed = seed_of(
        **{
            "scratch_long_i2-t2": piece("scratch", "long", curve((10, 0.3), (20, 0.4), (30, 0.5))),
            "scratch_long_i4-t4": piece("scratch", "long", curve((20, 0.5), (40, 0.6), (60, 0.7))),
            "scratch_short_i2-t2": piece("scratch", "short", curve((5, 0.2), (15, 0.55))),
            "distil_long_i2-t2": piece("distil", "long", curve((0, 0.0), (10, 0.4), (20, 0.5)), teacher=10.0),
            "distil_long_i4-t4": piece("distil", "long", curve((0, 0.0), (20, 0.8), (40, 0.8)), teacher=10.0),
            "mmlg_long_two_learngene": piece("mmlg", "long", curve((70, 0.0)), teacher=30.0, params=90),
            "mmlg_long_two_i2-t2": piece("mmlg", "long", curve((0, 0.4))),
            "mmlg_long_two_i4-t4": piece("mmlg", "long", curve((0, 0.8))),
        }
    )
    assert seed.mean_cost("scratch", "two", 0.6) == Cost(30 + 60, 2)
    assert seed.mean_cost("scratch", "two", 0.61) == Cost(None, 0)
    assert seed.mean_cost("scratch", "two", 0.45) == Cost(20 + 40, 2)
    assert seed.mean_cost("distil", "two", 0.6) == Cost(10 + 20, 2)
    assert seed.mean_cost("distil_joint", "two", 0.6) == Cost((10 - 5) + (20 - 5) + 5, 2)
    assert seed.mean_cost("mmlg", "two", 0.6) == Cost(70, 2)
    assert seed.mean_cost("mmlg", "two", 0.61) == Cost(None, 0)
    assert seed.mean_cost("even", "two", 0.6) is None
    found = family_frontier.marks(seed, "two")["long"]
    assert found["mean_target"] == pytest.approx(0.6)
    assert found["mean_ratio_to_learngene"] == pytest.approx({"scratch": 90 / 70, "distil": 30 / 70, "distil_joint": 25 / 70})
    assert found["mean_flops_with_ancestor"] == pytest.approx({"mmlg": 1070.0, "scratch": 90.0, "distil": 1030.0, "distil_joint": 1025.0})


def test_a_pool_is_charged_in_its_first_pass_only() -> None:
    """The teacher meets 10 of 20 samples: at the first target all of its FLOPs are spent already."""
    pool = {"baselines.distil_loss.teacher_pool": "10"}
    points = curve((0, 0.0), (10, 0.6), (15, 0.7), batch=1)
    short = piece("distil", "short", points, teacher=5.0, options=pool, size=[2, 2], modality="both")
    long = piece("distil", "short", curve((0, 0.0), (25, 0.4), (45, 0.7), batch=1), teacher=5.0, options=pool, size=[4, 4], modality="both")
    seed = seed_of(**{"distil_short_i2-t2": short, "distil_short_i4-t4": long})
    assert seed.cost("distil_joint", "two", both(0.5)) == Cost((10 - 5) + (45 - 5) + 5, 2)
    assert seed.cost("distil", "two", both(0.5)) == Cost(10 + 45, 2)


def test_an_untrained_model_at_the_target_costs_nothing_and_a_learngene_is_charged_once() -> None:
    seed = seed_of(
        **{
            "even_long_i2-t2": piece("even", "long", curve((0, 0.1), (10, 0.5), (20, 0.6)), teacher=4.0),
            "even_long_i4-t4": piece("even", "long", curve((0, 0.9), (20, 0.3), (40, 0.7)), teacher=4.0),
            "mmlg_long_two_learngene": piece("mmlg", "long", curve((70, 0.0)), teacher=30.0, params=90),
            "mmlg_long_two_i2-t2": piece("mmlg", "long", curve((0, 0.6))),
            "mmlg_long_two_i4-t4": piece("mmlg", "long", curve((0, 0.8))),
        }
    )
    assert seed.cost("even", "two", both(0.5)) == Cost(10 + 0, 2)
    assert seed.cost("mmlg", "two", both(0.6)) == Cost(70.0, 2)
    assert seed.cost("mmlg", "two", both(0.7)) == Cost(None, 1)
    assert family_frontier.with_ancestor("mmlg", 70.0, seed.ancestor) == 1070.0
    assert family_frontier.with_ancestor("scratch", 70.0, seed.ancestor) == 70.0
    assert family_frontier.notes(seed, "two") == ["uniform layer selection, distilled, long: ends below its start at i4-t4"]


def test_what_is_out_of_another_training_of_the_ancestor_is_noted() -> None:
    """Which of two it is goes by the digests of what was read; what a learngene was written from, by the learngene's."""

    def of(ancestor: str, method: str, schedule: str = "long") -> dict[str, Any]:
        return piece(method, schedule, curve((0, 0.6), (10, 0.7)), inputs={"ancestor": ancestor})

    pieces = {f"distil_{schedule}_i{n}-t{n}": of("a", "distil", schedule) for schedule in ("short", "long") for n in (2, 4)}
    pieces |= {"even_long_i2-t2": of("a", "even"), "even_long_i4-t4": of("a", "even")}
    pieces |= {"mmlg_long_two_learngene": of("a", "mmlg")}
    pieces |= {f"mmlg_long_two_i{n}-t{n}": piece("mmlg", "long", curve((0, 0.6))) for n in (2, 4)}
    assert family_frontier.notes(seed_of(**pieces), "two") == []
    pieces |= {"even_long_i4-t4": of("b", "even"), "mmlg_long_two_learngene": of("b", "mmlg")}
    seed = seed_of(**pieces)
    seed = Seed(PLAN, seed.pieces | {"mmlg_adapted/long/two/i4-t4": of("b", "mmlg_adapted")})
    same = "out of another training of the same ancestor than most"
    assert family_frontier.notes(seed, "two") == [
        f"uniform layer selection, distilled, long: {same} at i4-t4",
        f"learngene, long: {same}",
        f"mmlg_adapted, long: {same}",
    ]


def test_a_learngene_whose_training_is_continued_costs_both_trainings() -> None:
    seed = seed_of(
        **{
            "mmlg_long_two_learngene": piece("mmlg", "long", curve((70, 0.0)), teacher=30.0, params=90, inputs={"ancestor": "b"}),
            "mmlg_long_two_i2-t2": piece("mmlg", "long", curve((0, 0.6))),
            "mmlg_long_two_i4-t4": piece("mmlg", "long", curve((0, 0.8))),
            "mmlg_more_two_learngene": piece("mmlg", "more", curve((50, 0.0)), params=80, continues="mmlg/long/two/learngene"),
            "mmlg_more_two_i2-t2": piece("mmlg", "more", curve((0, 0.7))),
            "mmlg_more_two_i4-t4": piece("mmlg", "more", curve((0, 0.9))),
            "distil_long_i2-t2": piece("distil", "long", curve((0, 0.6), (10, 0.7)), inputs={"ancestor": "a"}),
            "distil_long_i4-t4": piece("distil", "long", curve((0, 0.6), (10, 0.7)), inputs={"ancestor": "a"}),
        }
    )
    assert seed.cost("mmlg", "two", both(0.6)) == Cost(70, 2)
    assert seed.cost("mmlg", "two", both(0.7)) == Cost(70 + 50, 2)
    assert seed.mean_cost("mmlg", "two", 0.8) == Cost(70 + 50, 2)
    rows = {row["schedule"]: (row["flops"], row["params_shipped"]) for row in family_frontier.ends(seed, "two") if row["way"] == "mmlg"}
    assert rows == {"long": (70.0, 90), "more": (120.0, 80)}
    # Both learngenes are of one ancestor, that of the first: distillation is what is of another one.
    assert family_frontier.notes(seed, "two") == ["separate distillation, long: out of another training of the same ancestor than most"]


def test_sizes_that_miss_a_target_untrained_are_charged_their_adaptation() -> None:
    seed = seed_of(
        **{
            "mmlg_long_two_learngene": piece("mmlg", "long", curve((70, 0.0)), teacher=30.0, params=90),
            "mmlg_long_two_i2-t2": piece("mmlg", "long", curve((0, 0.6))),
            "mmlg_long_two_i4-t4": piece("mmlg", "long", curve((0, 0.8))),
        }
    )
    members = {"two/i2-t2": curve((0, 0.6), (4, 0.7), (8, 0.75)), "two/i4-t4": curve((0, 0.8), (5, 0.7), (10, 0.85))}
    adapted = {f"mmlg_adapted/long/{name}": piece("mmlg_adapted", "long", points, teacher=2.0) for name, points in members.items()}
    seed = Seed(PLAN, {**seed.pieces, **adapted})
    assert seed.cost("mmlg", "two", both(0.6)) == Cost(70.0, 2)
    assert seed.cost("mmlg", "two", both(0.7)) == Cost(74.0, 2, num_adapted=1)
    assert seed.cost("mmlg", "two", both(0.8)) == Cost(None, 1)
    assert seed.cost("mmlg", "two", {(2, 2): 0.75, (4, 4): 0.85}) == Cost(70 + 8 + 10, 2, num_adapted=2)
    rows = {row["schedule"]: (row["flops"], row["validation"], row["params_shipped"]) for row in family_frontier.ends(seed, "two")}
    assert rows == {"long": (70.0, 0.7, 90), "long, all adapted": (88.0, 0.8, 200)}


def test_ratios_are_undefined_where_one_side_never_gets_there() -> None:
    assert family_frontier.ratios({"mmlg": 2.0, "scratch": 7.0, "distil": None}, "mmlg") == {"scratch": 3.5, "distil": None}
    assert family_frontier.ratios({"mmlg": None, "scratch": 7.0}, "mmlg") == {"scratch": None}


def _training_of(pieces: dict[str, Any], learngene: str) -> float:
    """FLOPs of a learngene, and of the one that it began as."""
    found = pieces[learngene]
    before = _training_of(pieces, found["continues"]) if "continues" in found else 0.0
    return float(found["flops"] + found["teacher_flops"] + before)


def _independent(pieces: dict[str, Any], sizes: list[str], metric: str, way: str, family: str, mark: str) -> float | None:
    """A way's cost at a marked target, written again without the benchmark's code; qualities to nine digits, as hits are counted."""
    targets = {size: pieces[f"scratch/{mark}/{size}"]["curve"][-1][metric] for size in sizes}
    method, _, joint = way.partition("_joint")
    joint = way.endswith("_joint")
    options = []
    for schedule in {found["schedule"] for found in pieces.values() if found["method"] == method}:
        if method in ("mmlg", "tleg", "sws", "direct"):
            names = [f"{method}/{schedule}/{family}/{size}" for size in sizes]
            if all(name in pieces for name in names):
                spent = _training_of(pieces, f"{method}/{schedule}/{family}/learngene")
                for name, size in zip(names, sizes, strict=True):
                    if round(pieces[name]["curve"][0][metric], 9) >= round(targets[size], 9):
                        continue
                    points = pieces.get(f"{method}_adapted/{schedule}/{family}/{size}", {"curve": []})["curve"]
                    good = [round(point[metric], 9) >= round(targets[size], 9) for point in points]
                    spent += next((points[i]["flops"] for i in range(len(good)) if good[i] and all(good[i : i + 2])), math.inf)
                options.append([spent if spent < math.inf else None])
            continue
        row: list[Any] = []
        for size in sizes:
            found = pieces.get(f"{method}/{schedule}/{size}")
            if found is None:
                break
            points = found["curve"]
            good = [round(point[metric], 9) >= round(targets[size], 9) for point in points]
            at = 0 if points[0]["step"] == 0 and good[0] else next((i for i in range(len(good)) if good[i] and all(good[i : i + 2])), None)
            if at is None:
                row.append(None)
            else:
                pool = found["options"].get(f"baselines.{method}_loss.teacher_pool", "null")
                met = points[-1]["samples"] if pool == "null" else int(pool)
                row.append((points[at]["flops"], found["teacher_flops"] * min(points[at]["samples"] / met, 1)))
        else:
            options.append(row)
    if method in ("mmlg", "tleg", "sws", "direct"):
        return min((cost for (cost,) in options if cost is not None), default=None)
    if joint:
        whole = [row for row in options if None not in row]
        return min((sum(f - t for f, t in row) + max(t for _, t in row) for row in whole), default=None)
    best = [min((found[0] for found in column if found is not None), default=None) for column in zip(*options, strict=True)]
    return None if None in best else sum(best)


def _independent_mean(pieces: dict[str, Any], sizes: list[str], metric: str, way: str, family: str, mark: str) -> float | None:
    """A way's cost until the sizes' mean is at scratch's, written again; qualities to nine digits."""

    def average(values: list[float]) -> float:
        return round(sum(values) / len(values), 9)

    target = average([pieces[f"scratch/{mark}/{size}"]["curve"][-1][metric] for size in sizes])
    method, joint = way.removesuffix("_joint"), way.endswith("_joint")
    options = []
    for schedule in {found["schedule"] for found in pieces.values() if found["method"] == method}:
        part = f"{family}/" if method in LEARNGENES else ""
        members = [pieces.get(f"{method}/{schedule}/{part}{size}") for size in sizes]
        if None in members:
            continue
        if part:
            if average([member["curve"][-1][metric] for member in members]) >= target:  # type: ignore[index]
                options.append(_training_of(pieces, f"{method}/{schedule}/{family}/learngene"))
            continue
        steps = len(members[0]["curve"])  # type: ignore[index]
        good = [average([member["curve"][i][metric] for member in members]) >= target for i in range(steps)]  # type: ignore[index]
        first = [points[0]["step"] for points in (member["curve"] for member in members)]  # type: ignore[index]
        at = 0 if set(first) == {0} and good[0] else next((i for i in range(steps) if good[i] and all(good[i : i + 2])), None)
        if at is None:
            continue
        cost, teachers = 0.0, []
        for member in members:
            assert member is not None
            pool = member["options"].get(f"baselines.{method}_loss.teacher_pool", "null")
            met = member["curve"][-1]["samples"] if pool == "null" else int(pool)
            teachers.append(member["teacher_flops"] * min(member["curve"][at]["samples"] / met, 1))
            cost += member["curve"][at]["flops"]
        options.append(cost - (sum(teachers) - max(teachers) if joint else 0))
    return min(options, default=None)


SUMMARIES = sorted(RESULTS.glob("family_cost_*_summary.json"))


@pytest.mark.parametrize("source", SUMMARIES, ids=lambda path: path.stem)
def test_every_committed_ratio_follows_from_the_raw_curves(source: Path) -> None:
    content = json.loads(source.read_text())
    plan = load_plan(content["plan"])
    num_checked = 0
    for family, derived in content["families"].items():
        sizes = [size_name(tuple(size)) for size in plan.families[family]]
        for number, figures in derived["seeds"].items():
            pieces = json.loads((RESULTS / f"family_cost_{plan.name}_seed{number}.json").read_text())["pieces"]
            for mark, found in figures["marks"].items():
                costs = {way: _independent(pieces, sizes, plan.metric, way, family, mark) for way in found["flops"]}
                assert costs == pytest.approx(found["flops"])
                means = {way: _independent_mean(pieces, sizes, plan.metric, way, family, mark) for way in found["mean_flops"]}
                assert means == pytest.approx(found["mean_flops"])
                needs = {way: 0.0 if way in ("scratch", "direct") else pieces["ancestor"]["flops"] for way in costs}
                whole, mean_whole = (
                    {way: cost + needs[way] if cost is not None else None for way, cost in each.items()} for each in (costs, means)
                )
                for key, table, ours in (
                    ("ratio_to_learngene", costs, "mmlg"),
                    ("ratio_to_learngene_with_ancestor", whole, "mmlg"),
                    ("ratio_to_direct_with_ancestor", whole, "direct"),
                    ("mean_ratio_to_learngene", means, "mmlg"),
                    ("mean_ratio_to_direct_with_ancestor", mean_whole, "direct"),
                ):
                    for way, value in found[key].items():
                        expected = table[way] / table[ours] if table[way] is not None and table.get(ours) else None
                        assert value == pytest.approx(expected), (family, number, mark, key, way)
                        num_checked += 1
    assert num_checked or not plan.marks


def test_committed_settings_are_those_that_tuning_found_best() -> None:
    for source in RESULTS.glob("family_cost_*_tuning.json"):
        content = json.loads(source.read_text())
        for method, found in content["methods"].items():
            best = max(found["trials"], key=lambda trial: trial["quality"])["settings"]
            assert {key: best[key] for key in found["best"]} == found["best"]
            rates = [trial["settings"]["learning_rate"] for trial in found["trials"]]
            assert min(rates) < found["best"]["learning_rate"] < max(rates), (source.name, method)


TINY = {
    "recipe": "recipe.yaml",
    "metric": "mean_recall@1",
    "families": {"five": [[1, 1], [2, 2]]},
    "methods": {"scratch": {"short": {"steps": 4}}, "mmlg": {"short": {"steps": 4}}},
    "marks": ["short"],
    "tuning": {},
}
RECIPE = {
    "data": {"scenes": {"num_train": 32, "num_val": 8, "num_test": 8}},
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
        }
    },
    "ancestor": {"steps": 4, "batch_size": 8},
    "extraction": {"min_layers": 1, "num_knots": 3, "training": {"batch_size": 8}},
    "baselines": {"scratch": {"batch_size": 8}},
}


def test_committed_results_stay_small() -> None:
    sizes = {file.name: file.stat().st_size for file in RESULTS.iterdir()}
    assert sizes
    assert {name for name, size in sizes.items() if size > 1_000_000} == set()


def test_a_plan_runs_once_and_its_result_is_enough_to_go_on_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"recipe": str(tmp_path / "recipe.yaml")}))
    plan = load_plan(str(tmp_path / "tiny.yaml"))
    target = run_seed(plan, 0, tmp_path / "runs", tmp_path, this_machine(plan))
    content = json.loads(target.read_text())
    assert list(content["pieces"]) == [piece.id for piece in Pieces(plan, 0, tuned_settings(plan, tmp_path)).all()]
    made_of = {name: found["inputs"] for name, found in content["pieces"].items()}
    assert made_of["scratch/short/i1-t1"] == made_of["ancestor"] == {}
    assert set(made_of["mmlg/short/five/learngene"]) == {"ancestor"}
    assert set(made_of["mmlg/short/five/i1-t1"]) == {"learngene"}
    ours = content["pieces"]["mmlg/short/five/i1-t1"]
    assert ours["curve"][0]["step"] == 0
    assert "test_at_0" not in ours  # not trained: `test` is of step 0
    assert sum(line.startswith('  "') for line in target.read_text().splitlines()) == len(content["pieces"])  # a line for each
    assert ours["flops"] == 0
    assert content["pieces"]["scratch/short/i2-t2"]["flops"] == content["pieces"]["ancestor"]["flops"]

    summary = family_frontier.write_summary(plan, tmp_path)
    flops = summary["families"]["five"]["seeds"]["0"]["marks"]["short"]["flops"]
    assert flops["scratch"] == sum(content["pieces"][f"scratch/short/{size}"]["flops"] for size in ("i1-t1", "i2-t2"))
    assert (tmp_path / "family_cost_tiny_five_frontier.svg").stat().st_size

    # The folders are gone: what the JSON has is not run again.
    (tmp_path / "runs" / "tiny" / "seed0").rename(tmp_path / "elsewhere")
    capfd.readouterr()
    run_seed(plan, 0, tmp_path / "runs", tmp_path, this_machine(plan))
    assert "6 pieces, 6 in family_cost_tiny_seed0.json" in capfd.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "runs" / "tiny" / "seed0").exists()
    assert json.loads(target.read_text()) == content

    # What was counted otherwise is missing.
    target.write_text(json.dumps(content | {"accounting": 1}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(family_cost.Runner, "run", lambda *_: None)
        run_seed(plan, 0, tmp_path / "runs", tmp_path, this_machine(plan))
    assert "6 pieces, 0 in family_cost_tiny_seed0.json" in capfd.readouterr().err.replace("\n", " ")

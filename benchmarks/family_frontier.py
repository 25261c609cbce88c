"""Tables and plots of the family-cost benchmark, out of its JSON files.

    python -m benchmarks.family_frontier scenes    # from results/family_cost_scenes_seed*.json: a summary, and two plots per family

A family at a target q (a quality for each of its sizes) costs, by each way of making it:

    separately trained methods   sum over sizes of the cheapest schedule's cost at the first of two consecutive evaluations at q
                                 (0 where the untrained model is at q)
    jointly distilled            the cheapest schedule's students up to q, and one teacher pass per batch until the last size is there
    learngenes                   the cheapest schedule whose members are all at q: its whole extraction or pre-training; where members
                                 were adapted, those that miss q untrained are charged their adaptation up to q besides

and is not defined where one size never gets there by any schedule. Targets are on the validation split; qualities at the end on the test
split. Marked targets are what scratch's schedules end with, size by size; the curve takes one q for all sizes. FLOPs include the
teacher's; the ancestor's are given apart and added.

One size of one seed decides such a cost. `mean_cost` asks less, and is less noisy: that the sizes' mean is at the mean of scratch's. All
sizes have the same schedule then and are trained equally long, and a learngene's are not adapted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib import rc_context

from benchmarks.family_plan import ADAPTED, LEARNGENES, NEEDS_ANCESTOR, RESULTS, WAYS, Plan, Size, load_plan, size_name
from benchmarks.family_plots import plot_cost, plot_frontier
from mmlg_scale.accounting import first_reached, reaches
from mmlg_scale.errors import UserError
from mmlg_scale.files import write_text_atomic

RATIOS = {
    "ratio_to_learngene": "{}",
    "ratio_to_learngene_with_ancestor": "{}, ancestor counted",
    "ratio_to_direct_with_ancestor": "{}, everything counted, ÷ direct pre-training",
    "mean_ratio_to_learngene": "{}, by the mean of the sizes",
    "mean_ratio_to_direct_with_ancestor": "{}, by the mean, everything counted, ÷ direct pre-training",
}
"""Ratios at a marked target, and how they are told."""
_ADAPTATION = {origin: method for method, origin in ADAPTED.items()}
Piece = Mapping[str, Any]
Targets = Mapping[Size, float]


@dataclass(frozen=True)
class Cost:
    """What a way costs at a target; FLOPs are None where a size never gets there."""

    flops: float | None
    num_reached: int
    """Sizes that get there: by their best schedule, or by the schedule that brings most of them there."""
    num_adapted: int = 0
    """Of them, those that are written from a learngene and adapted."""


class Seed:
    """The pieces of one seed's JSON."""

    def __init__(self, plan: Plan, pieces: Mapping[str, Piece]) -> None:
        self.plan, self.pieces = plan, pieces

    @property
    def ancestor(self) -> Piece:
        """The ancestor's run."""
        return self.pieces["ancestor"]

    def schedules(self, method: str) -> list[str]:
        """Those of which at least one piece is there."""
        return list(dict.fromkeys(piece["schedule"] for piece in self.pieces.values() if piece["method"] == method))

    def members(self, method: str, schedule: str, family: str) -> dict[Size, Piece]:
        """The family's models by size, as far as they are there."""
        prefix = f"{method}/{schedule}/{family}/" if method in LEARNGENES else f"{method}/{schedule}/"
        sizes = [tuple(size) for size in self.plan.families[family]]
        return {size: self.pieces[name] for size in sizes if (name := prefix + size_name(size)) in self.pieces}

    def adapted(self, method: str, schedule: str, family: str) -> dict[Size, Piece]:
        """The same models trained for a short while, as far as they are there; their curves begin untrained."""
        sizes = [tuple(size) for size in self.plan.families[family]]
        names = {size: f"{_ADAPTATION.get(method)}/{schedule}/{family}/{size_name(size)}" for size in sizes}
        return {size: self.pieces[name] for size, name in names.items() if name in self.pieces}

    def learngenes(self, method: str, schedule: str, family: str) -> list[Piece]:
        """The learngene of a schedule, then the one whose training it continues, if any."""
        found = [self.pieces[f"{method}/{schedule}/{family}/learngene"]]
        while origin := found[-1].get("continues"):
            found.append(self.pieces[origin])
        return found

    def learngene_flops(self, method: str, schedule: str, family: str) -> float:
        """What the learngene of a schedule costs: all of its training, the teacher included."""
        return float(sum(piece["flops"] + piece["teacher_flops"] for piece in self.learngenes(method, schedule, family)))

    def is_complete(self, method: str, schedule: str, family: str) -> bool:
        """Whether every size of the family is there."""
        return len(self.members(method, schedule, family)) == len(self.plan.families[family])

    def cost(self, way: str, family: str, targets: Targets) -> Cost | None:
        """What a way of making the family costs at `targets`; None where no schedule of it has been run for all sizes."""
        method = way.removesuffix("_joint")
        complete = [schedule for schedule in self.schedules(method) if self.is_complete(method, schedule, family)]
        if not complete:
            return None
        if method in LEARNGENES:
            return self._cheapest(complete, lambda schedule: self._of_learngene(method, schedule, family, targets))
        if way.endswith("_joint"):
            return self._cheapest(complete, lambda schedule: self._joint(method, schedule, family, targets))
        return self._separate(method, complete, family, targets)

    def mean_cost(self, way: str, family: str, target: float) -> Cost | None:
        """What a way costs until the mean of the family's sizes is at `target`; None where no schedule of it has been run for all sizes."""
        method = way.removesuffix("_joint")
        complete = [schedule for schedule in self.schedules(method) if self.is_complete(method, schedule, family)]
        if not complete:
            return None
        return self._cheapest(complete, lambda schedule: self._mean_of(way, method, schedule, family, target))

    def _mean_of(self, way: str, method: str, schedule: str, family: str, target: float) -> Cost:
        members = list(self.members(method, schedule, family).values())
        points = [self._mean_point(way, members, row) for row in zip(*(piece["curve"] for piece in members), strict=True)]
        point = reaching(points, target, self.plan.metric)
        if point is None:
            return Cost(None, 0)
        total = self.learngene_flops(method, schedule, family) if method in LEARNGENES else point["flops"]
        return Cost(total, len(members))

    def _mean_point(self, way: str, members: Sequence[Piece], row: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A point of the family's curve: what the sizes, trained equally long, cost together, and the mean of their qualities."""
        flops = sum(point["flops"] for point in row)
        if way.endswith("_joint"):
            teacher = [_of_teacher(piece, point) for piece, point in zip(members, row, strict=True)]
            flops += max(teacher) - sum(teacher)
        return {"step": row[0]["step"], "flops": flops, self.plan.metric: mean(point[self.plan.metric] for point in row)}

    @staticmethod
    def _cheapest(schedules: Iterable[str], cost: Callable[[str], Cost]) -> Cost:
        found = [cost(schedule) for schedule in schedules]
        return min(found, key=lambda each: (each.flops is None, each.flops or 0.0, -each.num_reached))

    def _of_learngene(self, method: str, schedule: str, family: str, targets: Targets) -> Cost:
        members = self.members(method, schedule, family) | self.adapted(method, schedule, family)
        points = [reaching(members[size]["curve"], target, self.plan.metric) for size, target in targets.items()]
        spent = [point["flops"] for point in points if point]
        total = self.learngene_flops(method, schedule, family) + sum(spent)
        return Cost(total if len(spent) == len(targets) else None, len(spent), sum(cost > 0 for cost in spent))

    def _separate(self, method: str, schedules: Sequence[str], family: str, targets: Targets) -> Cost:
        total, num_reached = 0.0, 0
        for size, target in targets.items():
            curves = [self.members(method, schedule, family)[size]["curve"] for schedule in schedules]
            spent = [point["flops"] for curve in curves if (point := reaching(curve, target, self.plan.metric))]
            num_reached += bool(spent)
            total += min(spent, default=0.0)
        return Cost(total if num_reached == len(targets) else None, num_reached)

    def _joint(self, method: str, schedule: str, family: str, targets: Targets) -> Cost:
        students, teacher, num_reached = 0.0, 0.0, 0
        for size, piece in self.members(method, schedule, family).items():
            point = reaching(piece["curve"], targets[size], self.plan.metric)
            if point is None:
                continue
            num_reached += 1
            of_teacher = _of_teacher(piece, point)
            students += point["flops"] - of_teacher
            teacher = max(teacher, of_teacher)
        return Cost(students + teacher if num_reached == len(targets) else None, num_reached)


def _of_teacher(piece: Piece, point: Mapping[str, Any]) -> float:
    """The teacher's part of the FLOPs at a point of a piece's curve."""
    return float(piece["teacher_flops"] * min(1.0, point["samples"] / _met_by_teacher(piece)))


def _met_by_teacher(piece: Piece) -> int:
    """Samples that the teacher computes: all that the student meets, or the pool."""
    pools = [int(value) for key, value in piece.get("options", {}).items() if key.endswith("loss.teacher_pool") and value != "null"]
    return min([piece["curve"][-1]["samples"], *pools])


def reaching(curve: Sequence[Mapping[str, Any]], target: float, metric: str) -> Mapping[str, Any] | None:
    """`accounting.first_reached`, where the end of a schedule counts too: nobody trains a schedule one evaluation longer to be sure."""
    point = first_reached(curve, target, metric)
    return curve[-1] if point is None and reaches(curve[-1][metric], target) else point


def with_ancestor(way: str, cost: float, ancestor: Piece) -> float:
    """The ancestor's training added where the way needs one."""
    return cost + ancestor["flops"] if way.removesuffix("_joint") in NEEDS_ANCESTOR else cost


def marked_targets(seed: Seed, family: str, mark: str) -> dict[Size, float] | None:
    """What a schedule of scratch ends with, size by size; None where it has not been run."""
    if not seed.is_complete("scratch", mark, family):
        return None
    return {size: piece["curve"][-1][seed.plan.metric] for size, piece in seed.members("scratch", mark, family).items()}


def marks(seed: Seed, family: str) -> dict[str, Any]:
    """Costs at the marked targets and their ratios: a way's cost divided by the learngene's, and by direct pre-training's."""
    found = {}
    for mark in seed.plan.marks:
        targets = marked_targets(seed, family, mark)
        if targets is None:
            continue
        costs = {way: cost for way in WAYS if (cost := seed.cost(way, family, targets)) is not None}
        flops = {way: cost.flops for way, cost in costs.items()}
        target = mean(targets.values())
        of_mean = {way: cost.flops for way in WAYS if (cost := seed.mean_cost(way, family, target)) is not None}
        whole, mean_whole = (
            {way: with_ancestor(way, cost, seed.ancestor) if cost is not None else None for way, cost in each.items()}
            for each in (flops, of_mean)
        )
        found[mark] = {
            "targets": {size_name(size): target for size, target in targets.items()},
            "num_sizes": len(targets),
            "num_reached": {way: cost.num_reached for way, cost in costs.items()},
            "num_adapted": {way: cost.num_adapted for way, cost in costs.items() if way in LEARNGENES},
            "flops": flops,
            "flops_with_ancestor": whole,
            "ratio_to_learngene": ratios(flops, "mmlg"),
            "ratio_to_learngene_with_ancestor": ratios(whole, "mmlg"),
            "ratio_to_direct_with_ancestor": ratios(whole, "direct"),
            "mean_target": target,
            "mean_flops": of_mean,
            "mean_flops_with_ancestor": mean_whole,
            "mean_ratio_to_learngene": ratios(of_mean, "mmlg"),
            "mean_ratio_to_direct_with_ancestor": ratios(mean_whole, "direct"),
        }
    return found


def ratios(costs: Mapping[str, float | None], ours: str) -> dict[str, float | None]:
    """Every way's cost divided by that of `ours`; None where one of them is not defined."""
    mine = costs.get(ours)
    return {way: cost / mine if cost is not None and mine else None for way, cost in costs.items() if way != ours}


def curve(seed: Seed, family: str, steps: int = 60) -> dict[str, list[list[float]]]:
    """[q, cost] of each way, for one q at all sizes, from a tenth of the best quality to the best."""
    sizes = [tuple(size) for size in seed.plan.families[family]]
    metric = seed.plan.metric
    best = max(point[metric] for piece in seed.pieces.values() for point in piece["curve"])
    found: dict[str, list[list[float]]] = {}
    for number in range(steps + 1):
        q = best * (0.1 + 0.9 * number / steps)
        for way in WAYS:
            cost = seed.cost(way, family, dict.fromkeys(sizes, q))
            if cost is not None and cost.flops is not None:
                found.setdefault(way, []).append([q, cost.flops])
    return found


def ends(seed: Seed, family: str) -> list[dict[str, Any]]:
    """What each schedule of each way costs in full, ships, and yields on the test split: the frontier's points."""
    rows = []
    for way in WAYS:
        method = way.removesuffix("_joint")
        for schedule in seed.schedules(method):
            if not seed.is_complete(method, schedule, family):
                continue
            members = seed.members(method, schedule, family)
            if method not in LEARNGENES:
                teacher = [piece["teacher_flops"] for piece in members.values()]
                flops = sum(piece["flops"] for piece in members.values()) + (max(teacher) if way.endswith("_joint") else sum(teacher))
                rows.append(_end(seed, way, schedule, members, flops, sum(piece["params"] for piece in members.values())))
                continue
            flops = seed.learngene_flops(method, schedule, family)
            params = seed.learngenes(method, schedule, family)[0]["params"]
            rows.append(_end(seed, way, schedule, members, flops, params))
            adapted = seed.adapted(method, schedule, family)
            if len(adapted) == len(members):
                flops += sum(piece["flops"] + piece["teacher_flops"] for piece in adapted.values())
                params = sum(piece["params"] for piece in adapted.values())
                rows.append(_end(seed, way, f"{schedule}, all adapted", adapted, flops, params))
    return rows


def _end(seed: Seed, way: str, schedule: str, members: Mapping[Size, Piece], flops: float, params: int) -> dict[str, Any]:
    return {
        "way": way,
        "schedule": schedule,
        "flops": flops,
        "flops_with_ancestor": with_ancestor(way, flops, seed.ancestor),
        "params_shipped": params,
        "share_of_ancestor": params / seed.ancestor["params"],
        "validation": mean(piece["curve"][-1][seed.plan.metric] for piece in members.values()),
        "test": {key: mean(piece["test"][key] for piece in members.values()) for key in seed.ancestor["test"]},
        "test_by_size": {size_name(size): piece["test"][seed.plan.metric] for size, piece in members.items()},
    }


def notes(seed: Seed, family: str) -> list[str]:
    """What a reader must know before believing a ratio."""
    metric, found = seed.plan.metric, []
    for method in ("scratch", "distil", "even", "even_plain"):
        for schedule in seed.schedules(method):
            members = seed.members(method, schedule, family)
            falling = [size_name(size) for size, piece in members.items() if piece["curve"][-1][metric] < piece["curve"][0][metric]]
            if falling:
                found.append(f"{WAYS[method]}, {schedule}: ends below its start at {', '.join(falling)}")
            if method == "scratch":
                equal = [(size, piece["curve"][-1][metric]) for size, piece in members.items() if len(set(size)) == 1]
                found += [
                    f"scratch, {schedule}: {size_name(deep)} ends below {size_name(shallow)}"
                    for (shallow, less), (deep, more) in pairwise(equal)
                    if more < less
                ]
    return found + _of_other_ancestors(seed, family)


def _of_other_ancestors(seed: Seed, family: str) -> list[str]:
    """Schedules out of another training of the ancestor than most: it was repeated, on a processor that rounds differently."""
    sources: dict[tuple[str, str], dict[str, str]] = {}
    for method in NEEDS_ANCESTOR:
        for schedule in seed.schedules(method):
            members = seed.adapted(ADAPTED[method], schedule, family) if method in ADAPTED else seed.members(method, schedule, family)
            if method in LEARNGENES and members:
                members = dict.fromkeys(members, seed.learngenes(method, schedule, family)[-1])
            # Pieces of versions that did not record it count as of one ancestor.
            of_size = {size_name(size): piece.get("inputs", {}).get("ancestor", "") for size, piece in members.items()}
            sources[method, schedule] = of_size
    every = Counter(source for of_size in sources.values() for source in of_size.values())
    if len(every) < 2:
        return []
    usual = every.most_common(1)[0][0]
    found = []
    for (method, schedule), of_size in sources.items():
        others = [size for size, source in of_size.items() if source != usual]
        if others:
            where = "" if len(others) == len(of_size) else f" at {', '.join(others)}"
            found.append(f"{WAYS.get(method, method)}, {schedule}: out of another training of the same ancestor than most{where}")
    return found


def summary(plan: Plan, seeds: Mapping[int, Seed]) -> dict[str, Any]:
    """Everything that is derived of the seeds, and mean and standard deviation of each ratio over them."""
    content: dict[str, Any] = {"plan": plan.name, "metric": plan.metric, "families": {}}
    for family in plan.families:
        by_seed = {
            str(number): {
                "marks": marks(seed, family),
                "ends": ends(seed, family),
                "curve": curve(seed, family),
                "notes": notes(seed, family),
            }
            for number, seed in seeds.items()
        }
        if any(figures["ends"] for figures in by_seed.values()):  # else no way of making the family has been run whole
            content["families"][family] = {"over_seeds": _over_seeds(by_seed), "seeds": by_seed}
    return content


def _over_seeds(by_seed: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed in by_seed.values():
        for mark, figures in seed["marks"].items():
            for kind in RATIOS:
                for way, value in figures[kind].items():
                    found.setdefault(mark, {}).setdefault(kind, {}).setdefault(way, []).append(value)
    return {
        mark: {kind: {way: _spread(values) for way, values in ways.items()} for kind, ways in kinds.items()}
        for mark, kinds in found.items()
    }


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean and standard deviation of a ratio over the seeds where it is defined, and how many those are."""
    known = [value for value in values if value is not None]
    return {
        "num_seeds": len(values),
        "num_defined": len(known),
        "mean": mean(known) if known else None,
        "standard_deviation": stdev(known) if len(known) > 1 else None,
    }


def table(content: Mapping[str, Any], family: str) -> str:
    """The ratios at the marked targets, mean over seeds, as Markdown; "not reached" where no seed has one."""
    over = content["families"][family]["over_seeds"]
    lines = [f"| {family}: cost ÷ learngene's | " + " | ".join(over) + " |", "|---|" + "---|" * len(over)]
    for kind, title in RATIOS.items():
        for way, name in WAYS.items():
            cells = [_cell(figures[kind].get(way)) for figures in over.values()]
            if any(cells):
                lines.append(f"| {title.format(name)} | " + " | ".join(cell or "–" for cell in cells) + " |")
    return "\n".join(lines)


def qualities(content: Mapping[str, Any], family: str) -> str:
    """Every way's schedules to their ends, mean over seeds, as Markdown."""
    metric, seeds = content["metric"], content["families"][family]["seeds"].values()
    rows: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for seed in seeds:
        for row in seed["ends"]:
            rows.setdefault((row["way"], row["schedule"]), []).append(row)
    lines = [f"| {family}, {metric} | TFLOP | ships, of the ancestor | validation | test | seeds |", "|---|---|---|---|---|---|"]
    for (way, schedule), found in rows.items():
        tests = [100 * row["test"][metric] for row in found]
        deviation = f" ± {stdev(tests):.1f}" if len(tests) > 1 else ""
        flops, share, validation = (mean(row[key] for row in found) for key in ("flops", "share_of_ancestor", "validation"))
        cells = f"{flops / 1e12:.2f} | {100 * share:.1f} % | {100 * validation:.1f} % | {mean(tests):.1f}{deviation} % | {len(found)}"
        lines.append(f"| {WAYS[way]}, {schedule} | {cells} |")
    return "\n".join(lines)


def _cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None or spread["mean"] is None:
        return "" if spread is None else "not reached"
    deviation = f" ± {spread['standard_deviation']:.2f}" if spread["standard_deviation"] is not None else ""
    few = f" ({spread['num_defined']} of {spread['num_seeds']} seeds)" if spread["num_defined"] < spread["num_seeds"] else ""
    return f"{spread['mean']:.2f}{deviation}{few}"


def read_seeds(plan: Plan, results: Path) -> dict[int, Seed]:
    """The seeds that have been run. Raises UserError where there is none."""
    files = sorted(results.glob(f"family_cost_{plan.name}_seed*.json"))
    if not files:
        raise UserError(f"{results} has no family_cost_{plan.name}_seed*.json. Run python -m benchmarks.family_cost {plan.name} first.")
    contents = [json.loads(file.read_text()) for file in files]
    return {content["seed"]: Seed(plan, content["pieces"]) for content in contents}


def write_summary(plan: Plan, results: Path) -> dict[str, Any]:
    """Write the summary and the plots beside the seeds' JSON; returns the summary."""
    seeds = read_seeds(plan, results)
    content = summary(plan, seeds)
    stem = f"family_cost_{plan.name}"
    write_text_atomic(results / f"{stem}_summary.json", json.dumps(content, indent=1) + "\n")
    ancestor = mean(seed.ancestor["flops"] for seed in seeds.values())
    for family in content["families"]:
        for name, figure in (("frontier", plot_frontier(content, family, ancestor)), ("cost", plot_cost(content, family))):
            with rc_context({"svg.hashsalt": "mmlg"}):  # the same figures give the same file
                figure.savefig(results / f"{stem}_{family}_{name}.svg", metadata={"Date": None})
    return content


def main() -> None:
    """Write the summary and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="A file of benchmarks/plans by its name (scenes, icons), or a path.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the JSON. Default: benchmarks/results.")
    arguments = parser.parse_args()
    try:
        plan = load_plan(arguments.plan)
        content = write_summary(plan, arguments.results)
    except UserError as error:
        sys.exit(f"family_frontier: error: {error}")
    for family in content["families"]:
        if content["families"][family]["over_seeds"]:
            print(table(content, family), end="\n\n")
        print(qualities(content, family), end="\n\n")
        for number, figures in content["families"][family]["seeds"].items():
            print(*(f"Seed {number}: {note}." for note in figures["notes"]), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()

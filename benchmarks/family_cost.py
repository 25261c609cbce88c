"""Is a family out of one learngene cheaper than its members by other means? Curves of every method, size and schedule.

    python -m benchmarks.family_cost scenes --tune --out runs/family-cost      # once: rates and batch sizes, on seed 0
    python -m benchmarks.family_cost scenes --seeds 3 --out runs/family-cost   # the runs, then tables and plots
    python -m benchmarks.family_frontier scenes                                # tables and plots again, from the JSON

PLAN is a file of benchmarks/plans, or a path. Each piece is one `mmlg` command in a folder of its own below OUT. Results go to
RESULTS/family_cost_PLAN_seedN.json whenever a method and schedule is complete; what is there with the same settings is not run again, so
that a benchmark of days can be spread over many sittings and machines. Nothing is stopped at a target: costs are read off whole curves.
Sizes that are at the target untrained are not adapted.
Where OUT has no ancestor any more it is trained again, and on another processor comes out slightly different: each piece has the digests
of what it was made of, and the notes say which are of another ancestor.

Every piece is a run of one process on this machine, or with --cluster a job of Slurm: OUT and the data are then on a shared file system.

Separate and joint distillation are one set of runs. A joint run computes the teacher once per batch for all sizes, which share nothing
else, and sees the same batches in the same order: its curves are those of the separate runs, only its teacher is charged once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlg_launchers import Launcher, LaunchError, LocalLauncher, Resources, SlurmLauncher, Step, StepFailed, load_cluster, run_graph

from benchmarks.family_plan import ADAPTED, LEARNGENES, RESULTS, SECTIONS, Piece, Pieces, Plan, Settings, as_options, load_plan
from mmlg_scale import recipe
from mmlg_scale.assemble import environment
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.errors import UserError
from mmlg_scale.family import num_parallel
from mmlg_scale.files import write_text_atomic
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.terminal import Terminal
from mmlg_scale.training.folder import IDENTITY_FILE, RESULT_FILE, read_json, result_of

ACCOUNTING = 2
"""What FLOPs are counted of. 1 (files that name none): whole captions and whole last blocks; 2: what is computed. Never mixed in a file."""


@dataclass(frozen=True)
class Place:
    """Where pieces run."""

    launcher: Launcher
    resources: Resources
    """Of each piece."""
    parallel: int
    """Pieces that run side by side."""
    environment: dict[str, Any]
    poll_seconds: float


def this_machine(plan: Plan, parallel: int | None = None) -> Place:
    """One process a piece; as many pieces side by side as there are GPUs, or cores for the recipe's threads."""
    _, runtime = load_recipe(plan.recipe)
    launcher = LocalLauncher(preload=("mmlg_scale.training.run", "deepspeed"))
    return Place(launcher, Resources(), parallel or num_parallel(runtime), environment(runtime), 0.2)


def slurm(plan: Plan, cluster: str, *, nodes: int, gpus_per_node: int | None, time: str | None, parallel: int | None) -> Place:
    """Jobs of Slurm, one rank for each GPU (one for each node where it has none); eight side by side unless said otherwise.

    Raises:
        LaunchError: the cluster file is damaged or missing.
    """
    site = load_cluster(cluster)
    gpus = site.gpus_per_node if gpus_per_node is None else gpus_per_node
    resources = Resources(
        num_processes=max(1, gpus),
        num_nodes=nodes,
        cpus_per_process=site.cpus_per_process,
        gpus_per_node=gpus,
        memory_gib=site.memory_gib,
        time=time or site.time,
    )
    _, runtime = load_recipe(plan.recipe)
    there = {"device": site.gpu_type or ("GPU" if gpus else "CPU"), "cores": site.cpus_per_process, "nodes": nodes, "gpus_per_node": gpus}
    launcher = SlurmLauncher(site, Path.cwd(), name=f"family-cost-{plan.name}")
    return Place(launcher, resources, parallel or 8, environment(runtime) | there, 5.0)


class Runner:
    """Runs pieces in folders below `out`, and knows which of them `kept` already has."""

    def __init__(self, plan: Plan, seed: int, out: Path, pieces: Sequence[Piece], place: Place) -> None:
        self.plan, self.place, self.out = plan, place, out / plan.origin
        self.pieces = {piece.id: piece for piece in pieces}
        self.folder = self.out / f"seed{seed}"

    @functools.cached_property
    def data(self) -> Path:
        """The data set: the recipe's, or scenes below `out`."""
        settings, _ = _settings(self.plan.recipe, as_options(self.plan.settings))
        return Path(settings.data.path) if settings.data.path is not None else self.out / "data"

    @functools.cached_property
    def data_digest(self) -> str:
        """What the numbers depend on of the data set."""
        return open_pairs(str(self.data)).digest()

    @functools.cache  # noqa: B019  # a runner lives as long as its process
    def digest(self, identifier: str) -> str:
        """SHA-256 of everything that a piece's numbers depend on."""
        piece = self.pieces[identifier]
        settings, _ = _settings(self.plan.recipe, piece.options)
        role = {"extract": "extraction", "pretrain": "pretraining"}.get(piece.command[0], "descendant")
        init = piece.command[piece.command.index("--init") + 1] if "--init" in piece.command else None
        if role == "extraction":
            init = piece.command[-1]
        used = settings.used_by("ancestor" if piece.id == "ancestor" else role, init=init)
        content = [used, piece.command, self.data_digest, [self.digest(needed) for needed in piece.needs]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def path(self, identifier: str) -> Path:
        """The folder of a piece: other settings, another folder."""
        return self.folder / f"{identifier.replace('/', '-')}-{self.digest(identifier)[:8]}"

    def run(self, wanted: Iterable[str], console: Terminal) -> None:
        """Run the pieces that have no result here, and first those that they need."""
        order: dict[str, Step] = {}

        def add(identifier: str) -> None:
            if identifier not in order and result_of(self.path(identifier)) is None:
                for needed in self.pieces[identifier].needs:
                    add(needed)
                order[identifier] = self._step(self.pieces[identifier])

        for identifier in wanted:
            add(identifier)
        steps = [dataclasses.replace(step, needs=tuple(need for need in step.needs if need in order)) for step in order.values()]
        place = self.place
        run_graph(steps, place.launcher, parallel=place.parallel, console=console, poll_seconds=place.poll_seconds)

    def make_data(self, console: Terminal) -> None:
        """Write the scenes where the recipe names no data set."""
        marker = self.data / "dataset.json"
        if marker.is_file():
            return
        settings, _ = _settings(self.plan.recipe, as_options(self.plan.settings))
        if settings.data.path is not None:
            raise UserError(f"{self.data} has no data set. Pack it first: see examples/.")
        options = [f"--{key}={value}" for key, value in vars(settings.data.scenes).items()]
        words = ("data", "scenes", "--out", str(self.data), *options)
        step = Step("data", _argv(*words), dataclasses.replace(self.place.resources, num_nodes=1, num_processes=1), (), marker)
        run_graph([step], self.place.launcher, parallel=1, console=console, poll_seconds=self.place.poll_seconds)

    def _step(self, piece: Piece) -> Step:
        folder = self.path(piece.id)
        words = [piece.command[0], self.plan.recipe, "--data.path", str(self.data), "--out", str(folder), *piece.command[1:]]
        words += [f"--{key}={value}" for key, value in piece.options]
        for needed in piece.needs:
            if needed == "ancestor":
                words += ["--ancestor-model", str(self.path(needed) / "model")]
            else:
                words += ["--learngene", str(self.path(needed) / "learngene.safetensors")]
        return Step(piece.id, _argv(*words), self.place.resources, piece.needs, folder / RESULT_FILE, checkpoints=folder / "checkpoints")

    def figures(self, piece: Piece) -> dict[str, Any] | None:
        """What is kept of a complete piece."""
        found = result_of(self.path(piece.id))
        if found is None:
            return None
        metric = self.plan.metric
        made_of = read_json(self.path(piece.id) / IDENTITY_FILE)["inputs"]
        point_keys = ("step", "samples", "flops", "seconds", metric)
        keys = ("params", "flops", "teacher_flops", "seconds", "bytes", "block_params", "stem_params")
        return {
            "digest": self.digest(piece.id),
            "method": piece.method,
            "schedule": piece.schedule,
            **({"family": piece.family} if piece.family else {}),
            **({"continues": piece.continues} if piece.continues else {}),
            **({"size": list(piece.size), "modality": piece.modality} if piece.size else {}),
            "options": dict(piece.options),
            "inputs": {key: made_of[key] for key in ("ancestor", "learngene") if key in made_of},
            **{key: found[key] for key in keys if found.get(key) is not None},
            "curve": [{key: point[key] for key in point_keys} for point in found["curve"]],
            "test": found["metrics"],
            **({"test_at_0": found["metrics_at_0"]} if found.get("metrics_at_0") and len(found["curve"]) > 1 else {}),
        }


@functools.cache
def _settings(name: str, options: tuple[tuple[str, str], ...]) -> tuple[recipe.Recipe, Any]:
    return load_recipe(name, **dict(options))


def _argv(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "mmlg_scale", *words)


def run_seed(plan: Plan, seed: int, out: Path, results: Path, place: Place, only: Sequence[str] = (), family: str | None = None) -> Path:
    """Run what is missing of a seed; returns its JSON file. Pieces of another way of counting FLOPs are missing.

    Args:
        only: methods, method/schedule, or further down what pieces are named by (their family, their size); empty: all.
        family: of one of the plan's families only; None: of all.
    """
    target = results / f"family_cost_{plan.name}_seed{seed}.json"
    before = json.loads(target.read_text()) if target.is_file() else {}
    kept = before["pieces"] if before.get("accounting") == ACCOUNTING else {}
    planned = Pieces(plan, seed, tuned_settings(plan, results))
    pieces = planned.all()
    runner, console = Runner(plan, seed, out, pieces, place), Terminal(stderr=True)
    environments = before.get("environments", [before["environment"]] if "environment" in before else [])
    environments += [place.environment] if place.environment not in environments else []
    runner.make_data(console)
    wanted = chosen(plan, pieces, only, family)
    asked = with_needs(pieces, wanted)
    missing = [piece for piece in asked if kept.get(piece.id, {}).get("digest") != runner.digest(piece.id)]
    console.print(f"seed {seed}: {len(asked)} pieces, {len(asked) - len(missing)} in {target.name}", highlight=False)
    groups: dict[tuple[str, str], list[Piece]] = {}
    for piece in missing:
        if piece.id in wanted:
            groups.setdefault((piece.method, piece.schedule), []).append(piece)
    for (method, schedule), group in groups.items():
        spared = planned.spared(kept)
        asked_for = [piece.id for piece in group if piece.id not in spared]
        if len(asked_for) < len(group):
            at_targets = f"{len(group) - len(asked_for)} of {len(group)} sizes are at the target untrained, and not adapted"
            console.print(f"{method}/{schedule}: {at_targets}", highlight=False)
        if not asked_for:
            continue
        runner.run(asked_for, console)
        found = {piece.id: figures for piece in missing if (figures := runner.figures(piece)) is not None}
        kept = {piece.id: (kept | found)[piece.id] for piece in pieces if piece.id in found or piece.id in kept}
        content = {
            "plan": plan.name,
            "seed": seed,
            "accounting": ACCOUNTING,
            "environments": environments,
            "pieces": kept,
        }
        write_text_atomic(target, as_text(content))
    return target


def as_text(content: Mapping[str, Any]) -> str:
    """A seed's JSON with a line for each piece: a change shows as the pieces that it changed, and indentation does not double the file."""
    head = json.dumps({key: value for key, value in content.items() if key != "pieces"}, indent=1).removesuffix("\n}")
    pieces = ",\n".join(f"  {json.dumps(name)}: {json.dumps(piece)}" for name, piece in content["pieces"].items())
    return f'{head},\n "pieces": {{\n{pieces}\n }}\n}}\n'


def chosen(plan: Plan, pieces: Sequence[Piece], only: Sequence[str] = (), family: str | None = None) -> set[str]:
    """The pieces that are asked for: of `only`, whose names end anywhere in those of pieces where these have a slash, and of `family`.

    A family needs its learngene, what is written from it, and every other model of a size that it has.
    """

    def is_of_family(piece: Piece) -> bool:
        if family is None or piece.family is not None:
            return family in (None, piece.family)
        return piece.size is None or list(piece.size) in plan.families[family]

    def is_named(piece: Piece) -> bool:
        return not only or any(f"{piece.id}/".startswith(f"{name}/") for name in only)

    return {piece.id for piece in pieces if is_of_family(piece) and is_named(piece)}


def with_needs(pieces: Sequence[Piece], wanted: Iterable[str]) -> list[Piece]:
    """Those that are wanted and what they are made of, in the order of `pieces`: a digest takes a tenth of a second, and plans are long."""
    by_id = {piece.id: piece for piece in pieces}
    found: set[str] = set()
    left = list(wanted)
    while left:
        identifier = left.pop()
        if identifier not in found:
            found.add(identifier)
            left += by_id[identifier].needs
    return [piece for piece in pieces if piece.id in found]


def tuned_settings(plan: Plan, results: Path) -> dict[str, Settings]:
    """What tuning found best, by method: learning rate and batch size; {} where it has not run."""
    source = results / f"family_cost_{plan.origin}_tuning.json"
    if not source.is_file():
        return {}
    return {method: found["best"] for method, found in json.loads(source.read_text())["methods"].items()}


def tune(plan: Plan, out: Path, results: Path, place: Place, only: Sequence[str] = ()) -> Path:
    """Tune what the plan asks for on seed 0, scratch first (the ancestor takes its rate); returns the JSON file.

    Entries of the plan are methods, tuned at pilot length, or method@schedule, tuned at the length that is written there: the best rate
    of a long schedule can be lower.

    Args:
        only: of these entries; empty: all.

    Raises:
        UserError: the plan uses another one's tuning.
    """
    if plan.like is not None:
        raise UserError(f"{plan.name} uses the tuning of {plan.like}: run python -m benchmarks.family_cost {plan.like} --tune.")
    target = results / f"family_cost_{plan.name}_tuning.json"
    content: dict[str, Any] = json.loads(target.read_text()) if target.is_file() else {"plan": plan.name, "methods": {}}
    starts = {name: start for name, start in plan.tuning.items() if _method(name) in SECTIONS and (not only or name in only)}
    from_scratch = [name for name in starts if _method(name) == "scratch"]
    for methods in (from_scratch, [name for name in starts if name not in from_scratch]):
        trials: dict[str, dict[str, Settings]] = {
            method: {_key(trial["settings"]): trial for trial in content["methods"].get(method, {}).get("trials", [])} for method in methods
        }
        while wanted := {name: found for name in methods if (found := next_trials(starts[name], trials[name], plan.tuning["trials"]))}:
            _run_trials(plan, out, results, place, wanted, trials)
            for method in methods:
                best = max(trials[method].values(), key=lambda trial: trial["quality"])["settings"]
                chosen = {key: best[key] for key in ("learning_rate", "batch_size")}
                content["methods"][method] = {"best": chosen, "trials": list(trials[method].values())}
            write_text_atomic(target, json.dumps(content, indent=1) + "\n")
    return target


def _method(name: str) -> str:
    return name.partition("@")[0]


def _key(settings: Settings) -> str:
    return json.dumps([settings["learning_rate"], settings["batch_size"]])


def next_trials(start: Settings, trials: Mapping[str, Settings], num_trials: int) -> list[Settings]:
    """Settings to try next, given the trials so far by `_key`; none where tuning is complete. `start` may have its own number of trials.

    First the starting rate, twice and half of it; then beyond the best rate while it is at an edge; then twice and half the batch size at
    that rate and equal samples, until the number of trials is reached. A best rate at an edge is followed beyond that number.
    """
    num_trials = start.get("trials", num_trials)
    start = {key: value for key, value in start.items() if key not in ("trials", "of", "size")}
    batch = start["batch_size"]

    def at(rate: float, size: int) -> Settings:
        return start | {"learning_rate": rate, "batch_size": size, "steps": start["steps"] * batch // size}

    first = [at(start["learning_rate"] * factor, batch) for factor in (1, 0.5, 2)]
    if missing := [trial for trial in first if _key(trial) not in trials]:
        return missing
    rates = sorted(trial["settings"]["learning_rate"] for trial in trials.values() if trial["settings"]["batch_size"] == batch)
    best = max(rates, key=lambda rate: trials[_key(at(rate, batch))]["quality"])
    if best in (rates[0], rates[-1]):
        return [at(best / 2 if best == rates[0] else best * 2, batch)]
    others = [at(best, batch // 2), at(best, batch * 2), at(best, batch // 4), at(best, batch * 4)]
    return [trial for trial in others if _key(trial) not in trials][: max(0, num_trials - len(trials))]


def _run_trials(
    plan: Plan, out: Path, results: Path, place: Place, wanted: Mapping[str, list[Settings]], trials: dict[str, dict[str, Settings]]
) -> None:
    pieces = Pieces(plan, 0, tuned_settings(plan, results))
    found: dict[str, tuple[str, Settings]] = {}
    every = [pieces.ancestor]
    for entry, settings in wanted.items():
        method = _method(entry)
        for each in settings:
            name = f"tune{each['steps'] * each['batch_size']}-{each['learning_rate']:g}-{each['batch_size']}"
            whole = each | {"eval_every": each["steps"]}
            if method in ADAPTED:
                asked = plan.tuning[entry]
                piece = pieces.adapted(method, asked["of"], whole, "five", tuple(asked["size"]), name)
                every += [pieces.learngene_of(method, asked["of"], "five")]
            elif method in LEARNGENES:
                piece = pieces.learngene(method, name, whole, None)
                if "continues" in whole:
                    every.append(pieces.continued(method, whole["continues"], None))
            else:
                (piece,) = pieces.of_method(method, name, whole, [tuple(plan.tuning["size"])])
            every.append(piece)
            found[piece.id] = entry, each
    runner, console = Runner(plan, 0, out, every, place), Terminal(stderr=True)
    runner.make_data(console)
    runner.run(found, console)
    for identifier, (entry, each) in found.items():
        figures = runner.figures(runner.pieces[identifier])
        assert figures is not None
        quality = figures["curve"][-1][plan.metric]
        trials[entry][_key(each)] = {"settings": each, "quality": quality, "flops": figures["flops"] + figures["teacher_flops"]}
        console.print(f"{identifier}: {plan.metric} {quality:.3f}", highlight=False)


def main() -> None:
    """Run a plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="A file of benchmarks/plans by its name (scenes, icons), or a path.")
    parser.add_argument("--seeds", type=int, default=1, help="How many seeds: 0, 1, ... Default: 1.")
    parser.add_argument("--first-seed", type=int, default=0, help="The first of them. Default: 0.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the runs.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the JSON and the plots. Default: benchmarks/results.")
    parser.add_argument("--tune", action="store_true", help="Tune the methods and stop.")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Run only these: METHOD, METHOD/SCHEDULE, mmlg/SCHEDULE/FAMILY, scratch/SCHEDULE/i2-t2; with --tune, entries of the plan.",
    )
    parser.add_argument(
        "--family", default=None, metavar="NAME", help="Run only what one of the plan's families needs: five, ten. Default: all of them."
    )
    parser.add_argument("--parallel", type=int, default=None, help="Pieces side by side. Default: as many as fit here; on a cluster eight.")
    parser.add_argument(
        "--cluster", default=None, metavar="FILE", help="Run every piece as a job of Slurm: a file as for mmlg launch slurm."
    )
    parser.add_argument("--nodes", type=int, default=1, help="Nodes of a job. Default: 1.")
    parser.add_argument("--gpus-per-node", type=int, default=None, help="GPUs of each node, and ranks on it. Default: the cluster file's.")
    parser.add_argument("--time", default=None, metavar="T", help="Time limit of a job. Default: the cluster file's.")
    arguments = parser.parse_args()
    for name in ("seeds", "parallel", "nodes"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            parser.error(f"--{name} is {number}; it must be 1 or more")
    try:
        plan = load_plan(arguments.plan)
        if arguments.family is not None and arguments.family not in plan.families:
            raise UserError(f"--family {arguments.family}: {plan.name} has {', '.join(plan.families)}.")
        asked = {key: getattr(arguments, key) for key in ("nodes", "gpus_per_node", "time", "parallel")}
        place = slurm(plan, arguments.cluster, **asked) if arguments.cluster else this_machine(plan, arguments.parallel)
        arguments.results.mkdir(parents=True, exist_ok=True)
        if arguments.tune:
            print(tune(plan, arguments.out.absolute(), arguments.results, place, arguments.only))
            return
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            print(run_seed(plan, seed, arguments.out.absolute(), arguments.results, place, arguments.only, arguments.family))
    except (UserError, LaunchError, StepFailed) as error:
        sys.exit(f"family_cost: error: {error}")


if __name__ == "__main__":
    main()

"""The family: data -> ancestor -> learngene -> descendants and baselines -> family.json and report.html, as a resumable graph.

The graph is plain steps (id, argv, resources, needs, marker) that a launcher runs, which knows nothing of CLIP. A step is an `mmlg` command
that resumes itself. It is complete when its folder holds a result of the identity that the recipe asks for now (see `training.folder`), so
that a changed recipe runs again what depends on the change, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mmlg_launchers import Launcher, LocalLauncher, Resources, Step, StepFailed, run_graph
from rich.console import Console

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import BYTES_PER_PARAMETER, WITHOUT_ANCESTOR
from mmlg_scale.assemble import assemble, draw_samples
from mmlg_scale.data.corpus import PairSet, pairs_of
from mmlg_scale.data.manifest import load_manifest
from mmlg_scale.data.mixture import Pattern, require_samples
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.files import require_space, write_text_atomic
from mmlg_scale.learngene.baselines import FROM_LEARNGENE
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.memory import checkpoint_bytes
from mmlg_scale.metric_names import check_metric
from mmlg_scale.recipe_file import to_content
from mmlg_scale.records import write_record
from mmlg_scale.report import console_table, write_report
from mmlg_scale.results import FamilyResult
from mmlg_scale.runtime import Runtime
from mmlg_scale.terminal import Terminal
from mmlg_scale.training.folder import IDENTITY_FILE, RESULT_FILE, differences, has_work, hold, result_of, set_aside
from mmlg_scale.training.learngene_roles import ExtractionRole, PretrainingRole
from mmlg_scale.training.roles import (
    AncestorRole,
    DescendantRole,
    Role,
    features_identity,
    load_ancestor,
    recipe_config,
)
from mmlg_scale.training.teacher_pool import FOLDER as TEACHER_POOL
from mmlg_scale.training.teacher_pool import require_budgets

SUPERSEDED = "superseded"


@dataclass(frozen=True)
class Member:
    """A step of the family, and what its folder is to hold."""

    step: Step
    identity: Callable[[PairSet], dict[str, Any]] | None
    """Known once what the step needs is complete; None for the data set, which knows its own arguments."""
    role: Role | None = None


class Plan:
    """The members of a family run in `out`, in the order in which free places are given to them.

    Without a data path the scenes are written first. Longer baselines come before shorter ones.
    """

    def __init__(self, settings: recipe.Recipe, runtime: Runtime, out: Path, *, image_size: int) -> None:
        self.given, self.runtime, self.out = settings, runtime, out
        self.data = settings.data.path if settings.data.is_given else str(out / "data")
        self.settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, path=self.data))
        self.ancestor = out / "ancestor"
        self.members: list[Member] = []
        self._first: tuple[str, ...] = ()
        if not settings.data.is_given:
            assert self.data is not None
            options = [f"--image-size={image_size}", *(f"--{key}={value}" for key, value in vars(settings.data.scenes).items())]
            self._add("data", ["data", "scenes", "--out", self.data, *options], (), Path(self.data) / "dataset.json", None, None)
            self._first = ("data",)
        self._train("ancestor", self.ancestor, (), settings.ancestor.steps, AncestorRole(self.settings))
        self._source, self._features = "ancestor", None
        if settings.engine.keep_features:
            self._source, self._features = "features", out / "features"
            words = ["features", *self._common(self._features), *self._model_options(features=False)]
            marker = self._features / RESULT_FILE
            of = lambda pairs: features_identity(self.settings, pairs, self.ancestor / "model")  # noqa: E731
            self._add("features", words, (*self._first, "ancestor"), marker, of, None, total=0)
        if settings.pretraining is not None:
            role = PretrainingRole(self.settings)
            self._train("direct", self.learngene("direct"), (), settings.pretraining.training.steps, role)
        for method in ("mmlg", *settings.baselines.learngenes()):
            self._extract(method)
        for init in ("scratch", "mmlg", *self.rivals(), "distil", "even"):
            for size in sorted(settings.family.sizes, key=lambda size: -(size.image_layers + size.text_layers)):
                self._descend(init, size)

    def rivals(self) -> list[str]:
        """The other learngenes that the recipe asks for."""
        return [*(["direct"] if self.settings.pretraining is not None else []), *self.settings.baselines.learngenes()]

    def extracted(self, method: str) -> Path:
        """The folder in which a learngene is extracted, or pre-trained directly."""
        return self.out / ("learngene" if method == "mmlg" else method)

    def learngene(self, method: str) -> Path:
        """The folder of the learngene that descendants are written from."""
        folder = self.extracted(method)
        return folder.with_name(f"{folder.name}-continued") if method in self.settings.continuations() else folder

    def descendant(self, size: recipe.Size, init: str) -> Path:
        """The folder of a descendant or a baseline."""
        return self.out / "descendants" / f"{size.name}-{init}"

    def _common(self, folder: Path) -> list[str]:
        return [str(self.out / "recipe.yaml"), *(["--data.path", self.data] if self.data is not None else []), "--out", str(folder)]

    def _model_options(self, *, features: bool = True) -> list[str]:
        cached = ["--features", str(self._features)] if features and self._features is not None else []
        return ["--ancestor-model", str(self.ancestor / "model"), *cached]

    def _add(
        self,
        identifier: str,
        command: list[str],
        needs: tuple[str, ...],
        marker: Path,
        identity: Callable[[PairSet], dict[str, Any]] | None,
        role: Role | None,
        total: int | None = None,
    ) -> None:
        resources = Resources(num_processes=self.runtime.num_processes if total is not None else 1)
        argv = (sys.executable, "-m", "mmlg_scale", *command)
        self.members.append(Member(Step(identifier, argv, resources, needs, marker, total), identity, role))

    def _train(self, identifier: str, folder: Path, needs: tuple[str, ...], total: int, role: Role, *options: str) -> None:
        command = {ExtractionRole: "extract", PretrainingRole: "pretrain"}.get(type(role), "train")
        words = [command, *self._common(folder), *options]
        self._add(identifier, words, (*self._first, *needs), folder / RESULT_FILE, role.identity, role, total)

    def _extract(self, method: str) -> None:
        folder, continued = self.extracted(method), self.learngene(method)
        extraction = ExtractionRole(self.settings, self.ancestor / "model", method, self._features)
        words = [*self._model_options(), "--method", method]
        self._train(folder.name, folder, (self._source,), extraction.extraction.training.steps, extraction, *words)
        if continued != folder:
            file = folder / "learngene.safetensors"
            role = PretrainingRole(self.settings, file, method)
            words = ["--learngene", str(file), "--method", method]
            self._train(continued.name, continued, (folder.name,), role.pretraining.training.steps, role, *words)

    def _descend(self, init: str, size: recipe.Size) -> None:
        settings, counted = self.settings, size.in_sum and size.modality == "both"
        from_learngene = init in FROM_LEARNGENE
        if (not from_learngene and getattr(settings.baselines, init) is None) or (init != "mmlg" and not counted):
            return
        role = DescendantRole(
            settings,
            init,
            size,
            ancestor=None if init in WITHOUT_ANCESTOR else self.ancestor / "model",
            learngene=self.learngene(init) / "learngene.safetensors" if from_learngene else None,
            features=self._features,
        )
        has_scratch = init != "scratch" and counted and settings.baselines.scratch is not None
        if role.training.steps and has_scratch and settings.family.stop_at_target:
            role = dataclasses.replace(role, target_of=self.descendant(size, "scratch"))
        words = ["--init", init, "--modality", size.modality, *(self._model_options() if role.ancestor else ())]
        words += [word for key, value in size.sizes().items() if value for word in (f"--{key.replace('_', '-')}", str(value))]
        needs: tuple[str, ...] = ()
        if role.learngene is not None:
            words += ["--learngene", str(role.learngene)]
            needs = (self.learngene(init).name,)
        elif init != "scratch":
            needs = (self._source,)
        if role.target_of is not None:
            words += ["--target-of", str(role.target_of)]
            needs = (*needs, role.target_of.name)
        folder = self.descendant(size, init)
        self._train(folder.name, folder, needs, role.training.steps, role, *words)


def run_family(settings: recipe.Recipe, runtime: Runtime, out: Path, *, launcher: Launcher | None = None) -> FamilyResult:
    """Run what is not complete in `out` and write family.json and report.html; returns the family.

    Raises:
        UserError: the recipe does not fit the data or the architecture; `out` contains a family of another ancestor or data set (names the
            keys that differ); a step failed.
    """
    out = out.absolute()
    console = Terminal(stderr=True)
    if not console.is_terminal:
        console = Terminal(stderr=True, width=130)  # a log file has no width of its own
    config = check(settings, runtime, out)
    params = sum(tensor.numel() for tensor in towers.build_meta(config).state_dict().values())
    # Weights of every model, and two checkpoints of the ancestor.
    require_space(out, params * BYTES_PER_PARAMETER * (1 + len(settings.family.sizes)) + 2 * checkpoint_bytes(params), "the family")
    plan = Plan(settings, runtime, out, image_size=towers.image_size(config))
    with hold(out):
        claim(settings, out)
        write_text_atomic(out / "recipe.yaml", yaml.safe_dump(to_content(settings, runtime), sort_keys=False))
        by_id = {member.step.id: member for member in plan.members}
        try:
            run_graph(
                [member.step for member in plan.members],
                launcher or _local_launcher(),
                parallel=num_parallel(runtime),
                console=console,
                is_complete=lambda step: is_complete(by_id[step.id], plan, console),
                progress=_trained_steps,
                news=_Evaluations(settings.evaluation.metric),
            )
        except StepFailed as error:
            raise UserError(f"{error} Start the same command to resume.") from error
        family = assemble(plan)
        write_record(out / "family.json", family.to_json())
        draw_samples(plan)
        report = write_report(out)
    console.print(console_table(family))
    console.print(f"report: {report}", highlight=False)
    console.print(f"learngene: {plan.learngene('mmlg') / 'learngene.safetensors'}", highlight=False, soft_wrap=True)
    return family


def check(settings: recipe.Recipe, runtime: Runtime, out: Path) -> dict[str, Any]:
    """Refuse whatever can be known to fail later; returns the ancestor's configuration, in which a vocab_size left out stays out.

    Raises:
        UserError: the recipe does not fit the data, the architecture or the runtime.
    """
    pairs = pairs_of(settings.data) if settings.data.is_given else None
    check_metric(settings.evaluation.metric, has_classes=pairs is None or pairs.classes is not None)
    config, weights = recipe_config(settings), settings.model.weights
    if config is None and weights is None:
        raise UserError("recipe key model: has no architecture and no weights. Name an open_clip configuration, or give weights.")
    if weights is not None and (config is None or pairs is not None):  # read once: they may be large
        ancestor = load_ancestor(settings, Path(weights), pairs) if pairs is not None else towers.load_clip(Path(weights))
        config = config or ancestor.spec.config
    assert config is not None
    for index, size in enumerate(settings.family.sizes):
        try:
            towers.with_sizes(config, **size.sizes())
        except UserError as error:
            raise UserError(f"recipe key family.sizes[{index}]: {error}") from error
    for section, elastic in settings.learngenes().items():
        with recipe.in_section(section):
            Structure(config, **{key: getattr(elastic, key) for key in Structure.SETTINGS})
    _check_batches(settings, runtime, pairs)
    require_budgets(settings, config, runtime.teacher_pool_bytes)
    if pairs is not None:
        for member in Plan(settings, runtime, out, image_size=towers.image_size(config)).members:
            if member.role is not None:
                member.role.check(pairs)
    return config


def _check_batches(settings: recipe.Recipe, runtime: Runtime, pairs: PairSet | None) -> None:
    """Raise UserError where a training's batch cannot be divided among the ranks, or there are fewer pairs than a batch or a pool takes."""
    trainings: dict[str, recipe.Training | None] = {
        "ancestor": settings.ancestor if settings.model.weights is None else None,
        "adaptation.training": settings.adaptation.training,
        "adaptation.direct": settings.adaptation.direct if settings.pretraining is not None else None,
    }
    trainings |= {f"baselines.{name}": getattr(settings.baselines, name) for name in ("scratch", "even", "distil")}
    trainings |= {f"{section}.training": found.training for section, found in settings.learngenes().items()}
    continued = settings.continuations().items()
    trainings |= {f"{recipe.section_of(method)}.continuation.training": found.training for method, found in continued}
    sources = [] if pairs is None else pairs.training()
    wheres = [str(source.folder) for source in sources] or ["the data set"]
    counts = [load_manifest(source.folder)["num_samples"] for source in sources] or [settings.data.scenes.num_train]
    pattern = Pattern([source.share for source in sources] or [1])
    for key, training in trainings.items():
        if training is None or not training.steps:
            continue
        if training.batch_size % (runtime.num_processes * training.accumulation):
            raise UserError(
                f"recipe key {key}.batch_size: {training.batch_size} is not a multiple of runtime.num_processes {runtime.num_processes} "
                f"times accumulation {training.accumulation}. Change one of them."
            )
        require_samples(wheres, counts, pattern, training.batch_size, key=key)
    for key, (loss, training) in settings.comparisons().items():
        require_samples(wheres, counts, pattern, training.batch_size, loss.teacher_pool, key)


def claim(settings: recipe.Recipe, out: Path) -> None:
    """Make `out`, which is held, the family of this ancestor and data set, or recognise it."""
    write_record(out / IDENTITY_FILE, check_folder(settings, out))


def check_folder(settings: recipe.Recipe, out: Path) -> dict[str, Any]:
    """What makes a folder the family of this ancestor and data set; nothing is written.

    Raises:
        UserError: `out` holds something else, or a family of another ancestor or data set with work in it.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Give a folder as --out.")
    whole = settings.to_dict()
    used = settings.used_by("ancestor")
    inputs = {}
    if settings.data.is_given:
        inputs["data_set"] = pairs_of(settings.data).digest()
    else:
        used["data"]["scenes"] = whole["data"]["scenes"]
    if settings.model.weights is not None:
        inputs["ancestor"] = file_digest(Path(settings.model.weights), "recipe key model.weights")
    identity = {"role": "family", "recipe": used, "inputs": inputs}
    differing = differences(out, identity)
    if differing is None:
        foreign = [path.name for path in (out.iterdir() if out.is_dir() else ()) if path.name != ".lock" and not path.name.endswith(".tmp")]
        if foreign:
            raise UserError(f"{out} exists and is not an mmlg family: it contains {foreign[0]}. Give another --out, or an empty folder.")
    elif differing and any(has_work(folder) for folder in (*out.iterdir(), *(out / "descendants").glob("*")) if folder.is_dir()):
        raise UserError(
            f"{out} contains a family of another ancestor or data set: {'; '.join(differing)}. Give another --out, or remove that folder."
        )
    return identity


def standing(member: Member, plan: Plan) -> list[str] | None:
    """What the folder of a step holds, all that the step needs being complete.

    None: no run of it; else in what the run there differs from the one that the recipe asks for, in words: [] where it is that run.
    """
    if member.identity is None:
        return [] if member.step.marker.exists() else None
    folder = member.step.folder
    found = differences(folder, member.identity(pairs_of(plan.settings.data))) if folder.exists() else None
    return ["it kept no outputs of the ancestor, which the adaptation reuses"] if found == [] and _lacks_pool(member, plan) else found


def _lacks_pool(member: Member, plan: Plan) -> bool:
    """Whether a complete extraction is without the ancestor's outputs that a descendant, which is not complete, is to be compared with."""
    if not isinstance(member.role, ExtractionRole) or (member.step.folder / TEACHER_POOL).exists() or result_of(member.step.folder) is None:
        return False

    def is_left(other: Member, role: DescendantRole) -> bool:
        # What a descendant is depends on its target: before that is known, it cannot be told from another.
        waits = role.target_of is not None and result_of(role.target_of) is None
        return waits or result_of(other.step.folder) is None or standing(other, plan) != []

    method = member.role.method
    roles = [(other, other.role) for other in plan.members if isinstance(other.role, DescendantRole)]
    return any(role.init == method and role.reuses_teacher_pool and is_left(other, role) for other, role in roles)


def is_complete(member: Member, plan: Plan, console: Console) -> bool:
    """Whether a step, all that it needs being complete, need not run; a run that the recipe no longer asks for is moved aside."""
    folder, step = member.step.folder, member.step
    differing = standing(member, plan)
    if not differing:
        return differing is not None and (member.identity is None or result_of(folder) is not None)
    if step.id == "ancestor" and has_work(folder):
        raise UserError(f"{folder} contains another ancestor: {'; '.join(differing)}. Give another --out, or remove {plan.out}.")
    if has_work(folder):
        with hold(folder):  # nobody trains in it
            kept = set_aside(folder, plan.out / SUPERSEDED)
        console.print(f"{step.id}: {'; '.join(differing)}. It runs again; the earlier run is in {kept}.", highlight=False, soft_wrap=True)
    return False


def _trained_steps(step: Step) -> int:
    """The last training step that the step's metrics file names."""
    path = step.folder / "metrics.jsonl"
    if step.total is None or not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4096))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line still being written
    return 0


class _Evaluations:
    """The evaluations that a step's metrics file has gained since the last call, in words."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._read: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def __call__(self, step: Step) -> list[str]:
        path = step.folder / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        start = self._read.get(step.id, 0)
        if step.total is None or size == start:
            return []
        with open(path, "rb") as file:
            file.seek(start if size > start else 0)  # a resumed run cuts its file back to its checkpoint
            content = file.read()
        whole = content.rfind(b"\n") + 1  # the last line may still be being written
        self._read[step.id] = (start if size > start else 0) + whole
        told = []
        for line in content[:whole].splitlines():
            try:
                figures = json.loads(line)
                number, value = figures["step"], figures["evaluation"][self.metric]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # figures of training
            if number > self._last.get(step.id, -1):
                self._last[step.id] = number
                told.append(f"{number}/{step.total}  {self.metric} {value:.3f}")
        return told


def _local_launcher() -> LocalLauncher:
    """On the CPU, steps are forks of a process that has the heavy imports behind it; a GPU's driver does not survive a fork."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return LocalLauncher(gpus=visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return LocalLauncher(preload=("mmlg_scale.training.run", "deepspeed"))


def num_parallel(runtime: Runtime) -> int:
    """Steps that run side by side."""
    if runtime.parallel is not None:
        return runtime.parallel
    if torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // runtime.num_processes)
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (runtime.num_processes * (runtime.threads or cores)))

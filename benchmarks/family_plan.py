"""Plans of the family-cost benchmark: which methods, schedules, sizes and seeds, and the `mmlg` commands that they come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmlg_scale import recipe
from mmlg_scale.accounting import reaches
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.recipe_file import load_recipe

PLANS = Path(__file__).with_name("plans")
RESULTS = Path(__file__).with_name("results")
SECTIONS = {
    "scratch": "baselines.scratch",
    "distil": "baselines.distil",
    "even": "baselines.even",
    "even_plain": "baselines.even",
    "mmlg": "extraction",
    "tleg": "baselines.tleg",
    "sws": "baselines.sws",
    "direct": "pretraining",
    "mmlg_adapted": "adaptation",
    "tleg_adapted": "adaptation",
    "sws_adapted": "adaptation",
    "direct_adapted": "adaptation.direct",
}
"""Where the recipe has the settings of a method."""
LEARNGENES = ("mmlg", "tleg", "sws", "direct")
ADAPTED = {"mmlg_adapted": "mmlg", "tleg_adapted": "tleg", "sws_adapted": "sws", "direct_adapted": "direct"}
"""Short training of what is written from a learngene, whose schedule is named as theirs: the pieces of those methods."""
NEEDS_ANCESTOR = ("distil", "even", "even_plain", "mmlg", "tleg", "sws", "mmlg_adapted", "tleg_adapted", "sws_adapted")
WAYS = {
    "mmlg": "learngene",
    "direct": "learngene, pre-trained directly",
    "tleg": "TLEG",
    "sws": "SWS",
    "scratch": "scratch",
    "distil": "separate distillation",
    "distil_joint": "joint distillation",
    "even": "uniform layer selection, distilled",
    "even_joint": "uniform layer selection, jointly distilled",
    "even_plain": "uniform layer selection",
}
"""Of making a family, as they are told; NAME_joint are the runs of NAME with one teacher pass for all sizes."""
Size = tuple[int, ...]
"""Layers of the image and the text tower, then their width where it is not the ancestor's."""
Settings = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One run: a model of one size, or a learngene."""

    id: str
    method: str
    schedule: str
    command: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    """Of the recipe, by dotted key."""
    needs: tuple[str, ...] = ()
    family: str | None = None
    """Of a learngene and what is written from it."""
    size: Size | None = None
    modality: str = "both"
    continues: str | None = None
    """Of a learngene: the one whose training it continues."""


@dataclass(frozen=True)
class Plan:
    """A benchmark: the file in benchmarks/plans."""

    name: str
    recipe: str
    metric: str
    families: dict[str, list[list[int]]]
    methods: dict[str, dict[str, Settings]]
    marks: list[str]
    tuning: Settings
    settings: Settings = field(default_factory=dict)
    family_settings: dict[str, Settings] = field(default_factory=dict)
    single_towers: Settings | None = None
    eval_samples: int = 3_200
    """Samples between two evaluations."""
    like: str | None = None
    """Another plan: this one shares its ancestor, folders and tuning, and all but methods and marks that the file does not name itself."""

    @property
    def origin(self) -> str:
        """Name of the plan whose folders and tuning are used."""
        return self.like or self.name

    def families_of(self, schedule: Settings) -> dict[str, list[list[int]]]:
        """The families that a schedule of a learngene is for: those that it names under `families`, else all."""
        asked = schedule.get("families", self.families)
        return {name: sizes for name, sizes in self.families.items() if name in asked}

    @property
    def sizes(self) -> list[Size]:
        """Every size of any family, once."""
        return list(dict.fromkeys(tuple(size) for sizes in self.families.values() for size in sizes))


def load_plan(name: str) -> Plan:
    """The plan by path or shipped name. Raises UserError where there is none."""
    path = Path(name) if name.endswith(".yaml") else PLANS / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such plan. Shipped are {', '.join(sorted(file.stem for file in PLANS.glob('*.yaml')))}.")
    content = yaml.safe_load(path.read_text())
    if like := content.get("like"):
        origin = vars(load_plan(like))
        content["settings"] = origin["settings"] | content.get("settings", {})
        content = {key: value for key, value in origin.items() if key not in ("name", "like", "methods", "marks")} | content
    return Plan(name=path.stem, **content)


def size_name(size: Size, modality: str = "both") -> str:
    """As in the names of a family's folders."""
    return recipe_size(size, modality).name


def recipe_size(size: Size, modality: str = "both") -> recipe.Size:
    """A size as the recipe has it."""
    width = size[2] if len(size) > 2 else None
    return recipe.Size(size[0], size[1], width, width, modality)  # type: ignore[arg-type]


def options_of(method: str, settings: Mapping[str, Any]) -> Settings:
    """A method's settings by the recipe's dotted keys."""
    section = SECTIONS[method]
    nested = method in LEARNGENES or section == "adaptation"
    training = f"{section}.training" if nested else section
    loss = f"{section}.loss" if nested else f"{section}_loss"
    places = {key.name: f"{section}.{key.name}" for key in dataclasses.fields(recipe.Extraction)} if method in LEARNGENES else {}
    places |= {key.name: f"{loss}.{key.name}" for key in dataclasses.fields(recipe.DistillationLoss)}
    places |= {"learning_rate": f"{training}.optimizer.learning_rate", "reuse_teacher_pool": f"{section}.reuse_teacher_pool"}
    found = {places.get(key, f"{training}.{key}"): value for key, value in settings.items()}
    if method == "even_plain":
        found["baselines.even_loss"] = None
    return found


def as_options(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Settings by dotted key as options of the command line, sorted: a section before its fields."""
    return tuple((key, "null" if value is None else str(value)) for key, value in sorted(settings.items()))


def _of_recipe(settings: Mapping[str, Any]) -> Settings:
    """A schedule's settings without those that say which families and sizes it is for."""
    return {key: value for key, value in settings.items() if key not in ("families", "sizes", "until")}


class Pieces:
    """The pieces of a plan for one seed.

    Args:
        tuned: by method, or by method@schedule where the two were tuned together, settings that replace those of its schedules where these
            do not name them. The ancestor takes the rate of scratch@converged where the plan names none.
    """

    def __init__(self, plan: Plan, seed: int, tuned: Mapping[str, Settings]) -> None:
        self.plan, self.seed, self.tuned = plan, seed, tuned
        ancestor = {key: value for key, value in self.tuned_for("scratch", "converged").items() if key != "batch_size"}
        options = {f"ancestor.{'optimizer.' if key == 'learning_rate' else ''}{key}": value for key, value in ancestor.items()}
        options = {key: value for key, value in options.items() if key not in plan.settings}
        self.ancestor = self._piece("ancestor", "ancestor", "whole", ("train",), options)

    def tuned_for(self, method: str, schedule: str) -> Settings:
        """What tuning found for a schedule: for itself, or for the method at pilot length; with a pool or growth the same as without."""
        return dict(self.tuned.get(f"{method}@{schedule.partition('-')[0]}", self.tuned.get(method, {})))

    def _piece(
        self, identifier: str, method: str, schedule: str, command: tuple[str, ...], options: Mapping[str, Any], **more: Any
    ) -> Piece:
        absent = tuple(f"{key}." for key, value in options.items() if value is None)
        settings = {key: value for key, value in self.plan.settings.items() if not key.startswith(absent)}
        chosen = {"seed": self.seed} | settings | dict(options)
        return Piece(identifier, method, schedule, command, as_options(chosen), **more)

    def of_method(self, method: str, schedule: str, settings: Settings, sizes: Iterable[Size] | None = None) -> Iterator[Piece]:
        """The pieces of a method's schedule: all that must run, the ancestor apart."""
        chosen = self._chosen(method, schedule, settings)
        if method in ADAPTED:
            asked = chosen.get("sizes", self.plan.sizes)
            for family, members in self.plan.families_of(chosen).items():
                for size in members:
                    if tuple(size) in map(tuple, asked):
                        yield self.adapted(method, schedule, _of_recipe(chosen), family, tuple(size))
            return
        if method not in LEARNGENES:
            for size in self.plan.sizes if sizes is None else sizes:
                init = "even" if method == "even_plain" else method
                words = ("train", "--init", init, *_size_words(size))
                needs = () if method == "scratch" else ("ancestor",)
                identifier = f"{method}/{schedule}/{size_name(size)}"
                yield self._piece(identifier, method, schedule, words, options_of(method, chosen), needs=needs, size=size)
            return
        for family, members in self.plan.families_of(chosen).items():
            learngene = self.learngene(method, schedule, chosen, family)
            yield learngene
            for size in members:
                yield self._written(learngene, tuple(size))
            towers = self.plan.single_towers
            if method == "mmlg" and towers is not None and towers["family"] == family:
                for modality in ("image", "text"):
                    yield self._written(learngene, (towers["image_layers"], towers["text_layers"]), modality)

    def _chosen(self, method: str, schedule: str, settings: Settings) -> Settings:
        """A schedule's settings completed by what tuning found."""
        tuned = self.tuned_for(method, schedule)
        if {"steps", "batch_size"} <= tuned.keys() | settings.keys() and "batch_size" not in settings and method in self.plan.tuning:
            # A schedule's steps are of the batch size that tuning started with: another one sees as many samples.
            settings = settings | {"steps": settings["steps"] * self.plan.tuning[method]["batch_size"] // tuned["batch_size"]}
        return {"eval_every": self._eval_every(method, tuned | settings)} | tuned | settings

    def _eval_every(self, method: str, settings: Settings) -> int:
        """Learngenes are judged at the end of a schedule; all else equally often in samples."""
        if method in LEARNGENES:
            return int(settings["steps"])
        untuned = self.plan.tuning.get(method, {}).get("batch_size", 128)
        return max(1, self.plan.eval_samples // int(settings.get("batch_size", untuned)))

    def learngene(self, method: str, schedule: str, settings: Settings, family: str | None) -> Piece:
        """Extraction or pre-training, or pre-training that continues another schedule; for a family with the family's settings."""
        if "continues" in settings:
            return self._continued(method, schedule, settings, family)
        settings = _of_recipe(settings) | self.plan.family_settings.get(family or "five", {})
        command = ("pretrain",) if method == "direct" else ("extract", "--method", method)
        needs = ("ancestor",) if method in NEEDS_ANCESTOR else ()
        identifier = f"{method}/{schedule}/{family}/learngene" if family else f"{method}/{schedule}"
        options = options_of(method, settings) | self._reuse(method, schedule)
        return self._piece(identifier, method, schedule, command, options, needs=needs, family=family)

    def continued(self, method: str, schedule: str, family: str | None) -> Piece:
        """The learngene of a schedule that another one continues."""
        return self.learngene(method, schedule, self._chosen(method, schedule, self.plan.methods[method][schedule]), family)

    def _continued(self, method: str, schedule: str, settings: Settings, family: str | None) -> Piece:
        origin, of_origin = self.continued(method, settings["continues"], family), self.plan.methods[method][settings["continues"]]
        settings = {key: value for key, value in _of_recipe(settings).items() if key != "continues"}
        options = options_of("direct", settings | self.plan.family_settings.get(family or "five", {})) | self._structure(method, of_origin)
        identifier = f"{method}/{schedule}/{family}/learngene" if family else f"{method}/{schedule}"
        more: Settings = {"needs": (origin.id,), "family": family, "continues": origin.id}
        return self._piece(identifier, method, schedule, ("pretrain",), options, **more)

    def _structure(self, method: str, schedule: Settings) -> Settings:
        """What pre-training must say to continue a learngene that was extracted by a method with a schedule's settings."""
        settings, _ = load_recipe(self.plan.recipe, **dict(as_options(self.plan.settings)))
        extraction = settings.extraction if method == "mmlg" else settings.baselines.learngenes()[method]
        keys = (*Structure.SETTINGS, "min_layers", "max_layers")
        return {f"pretraining.{key}": schedule.get(key, getattr(extraction, key)) for key in keys}

    def _reuse(self, origin: str, schedule: str) -> Settings:
        """What a recipe must say besides, for an extraction as for the adaptation, where this reuses that one's pool; else nothing."""
        found = [method for method, of in ADAPTED.items() if of == origin]
        asked = self.plan.methods.get(found[0], {}).get(schedule, {}) if found else {}
        if not asked.get("reuse_teacher_pool"):
            return {}
        chosen = self._chosen(origin, schedule, self.plan.methods[origin][schedule])
        # Where nothing was tuned the batch size is neither's.
        pool = {"loss.teacher_pool": chosen["teacher_pool"]} | {
            f"training.{key}": chosen[key] for key in ("steps", "batch_size") if key in chosen
        }
        own = {"extraction", SECTIONS[origin]}  # the recipe always has an extraction, which is held to the same
        others = {SECTIONS[method]: None for method in ("tleg", "sws") if method != origin}
        adaptation = options_of(found[0], _of_recipe(self._chosen(found[0], schedule, asked)))
        return adaptation | {f"{section}.{key}": pool[key] for section in own for key in pool} | others

    def _written(self, learngene: Piece, size: Size, modality: str = "both") -> Piece:
        words = ("train", "--init", learngene.method, "--modality", modality, *_size_words(size, modality))
        identifier = learngene.id.replace("learngene", size_name(size, modality))
        needs = ("ancestor", learngene.id) if modality != "both" else (learngene.id,)
        options = {"adaptation.training.steps": 0}
        more: Settings = {"family": learngene.family, "size": size, "modality": modality}
        return self._piece(identifier, learngene.method, learngene.schedule, words, options, needs=needs, **more)

    def adapted(self, method: str, schedule: str, settings: Settings, family: str, size: Size, name: str | None = None) -> Piece:
        """A size trained after it is written from the learngene of a schedule; `name` replaces the schedule's in the piece's."""
        words = ("train", "--init", ADAPTED[method], "--modality", "both", *_size_words(size))
        identifier = f"{method}/{name or schedule}/{family}/{size_name(size)}"
        ancestor = ("ancestor",) if method in NEEDS_ANCESTOR else ()
        more: Settings = {"needs": (*ancestor, self.learngene_of(method, schedule, family).id), "family": family, "size": size}
        options = self._reuse(ADAPTED[method], schedule) | options_of(method, settings)
        return self._piece(identifier, method, name or schedule, words, options, **more)

    def learngene_of(self, method: str, schedule: str, family: str) -> Piece:
        """The learngene whose descendants a method of `ADAPTED` trains."""
        return self.continued(ADAPTED[method], schedule, family)

    def all(self) -> list[Piece]:
        """Every piece, in the order in which they run: short schedules of all methods before long ones, and adaptations at the end."""
        schedules = list(dict.fromkeys(name for found in self.plan.methods.values() for name in found))
        found = [self.ancestor]
        for is_adapted in (False, True):
            for schedule in sorted(schedules, key=lambda name: name == "converged"):
                for method, settings in self.plan.methods.items():
                    if schedule in settings and (method in ADAPTED) == is_adapted:
                        found += self.of_method(method, schedule, settings[schedule])
        return found

    def spared(self, kept: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Adaptations that no marked target asks for: of sizes that are at theirs untrained, as far as `kept` (figures by piece) shows.

        An adapted schedule's `until` names the target; without it every marked one is asked for.
        """
        metric, found = self.plan.metric, set()
        for piece in self.all():
            if piece.method not in ADAPTED or piece.size is None:
                continue
            size = size_name(piece.size)
            until = self.plan.methods[piece.method][piece.schedule].get("until")
            names = [f"scratch/{mark}/{size}" for mark in ([until] if until else self.plan.marks)]
            untrained = f"{ADAPTED[piece.method]}/{piece.schedule}/{piece.family}/{size}"
            if names and all(name in kept for name in (*names, untrained)):
                quality = kept[untrained]["curve"][-1][metric]
                if all(reaches(quality, kept[name]["curve"][-1][metric]) for name in names):
                    found.add(piece.id)
        return found


def _size_words(size: Size, modality: str = "both") -> tuple[str, ...]:
    sizes = recipe_size(size, modality).sizes()
    return tuple(word for key, value in sizes.items() if value for word in (f"--{key.replace('_', '-')}", str(value)))

"""What a run can be, and what each kind reads, builds, and compares at a restart: here the ancestor, and a descendant or baseline.

Those that train a learngene are in `learngene_roles`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import first_reached
from mmlg_scale.data.corpus import PairSet, choose_tokenizer
from mmlg_scale.data.images import READING
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.baselines import FROM_ANCESTOR, FROM_LEARNGENE, initialise
from mmlg_scale.learngene.file import Learngene, load_learngene
from mmlg_scale.results import RunResult
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.folder import RESULT_FILE, result_of
from mmlg_scale.training.loop import Curve
from mmlg_scale.training.stages import ClipStage, Stage, TowerStage
from mmlg_scale.training.teacher import CachedTeacher, LiveTeacher, Teacher
from mmlg_scale.training.teacher_pool import KeptTeacher, Layout, PooledTeacher, PoolFile, is_walked_again, require_budget


@dataclass(frozen=True)
class Context:
    """Where a role builds its stage.

    Attributes:
        resumes: whether a checkpoint will replace the weights, so that a costly start can be left out.
        folder: the run's, for what is written while it is under way; None: nothing is.
    """

    pairs: PairSet
    runtime: Runtime
    device: torch.device
    resumes: bool = False
    folder: Path | None = None


class Role(Protocol):
    """What a training run needs to know of its subject."""

    @property
    def settings(self) -> recipe.Recipe:
        """The recipe."""
        ...

    @property
    def evaluate_first(self) -> bool:
        """Whether the model is worth evaluating before any training."""
        ...

    def check(self, pairs: PairSet) -> None:
        """Raise UserError for whatever can be known to fail before anything is built."""
        ...

    def identity(self, pairs: PairSet) -> dict[str, Any]:
        """What the run is, see `folder`."""
        ...

    def build(self, context: Context) -> Stage:
        """The stage, its weights before training. Collective."""
        ...

    def stop(self, curve: Curve) -> bool:
        """Whether training ends after the evaluations so far."""
        ...


def recipe_config(settings: recipe.Recipe) -> dict[str, Any] | None:
    """The recipe's open_clip configuration; None where the recipe leaves it to a model folder. A vocab_size left out stays out."""
    named = settings.model.config if settings.model.config is not None else settings.model.architecture
    if named is None:
        return None
    config = towers.model_config(named)
    return towers.with_logit_bias(config) if settings.model.loss == "siglip" else config


def fresh_spec(settings: recipe.Recipe, pairs: PairSet) -> towers.ModelSpec:
    """What a model trained from scratch on `pairs` is; a vocab_size left out is the tokenizer's.

    Raises:
        UserError: the recipe names no architecture, or one whose vocabulary is smaller than the tokenizer's.
    """
    config = recipe_config(settings)
    if config is None:
        raise UserError("recipe key model: has no architecture. Name an open_clip configuration, or give one inline as model.config.")
    tokenizer = choose_tokenizer(pairs, None, settings.data.tokenizer, what="a model trained from scratch")
    config["text_cfg"].setdefault("vocab_size", tokenizer.vocab_size)
    spec = towers.ModelSpec(config, tokenizer=tokenizer)
    spec.require_tokenizer("recipe key model.config.text_cfg.vocab_size (left out it is the tokenizer's)")
    return spec


def load_ancestor(settings: recipe.Recipe, path: Path, pairs: PairSet) -> towers.Bundle:
    """The ancestor at `path`, a model folder or a file of weights for the recipe's architecture.

    Raises:
        UserError: no such model, another architecture than the recipe's, or another tokenizer than the data set's.
    """
    config = recipe_config(settings)
    if config is None and not path.is_dir():
        raise UserError(f"recipe key model: has no architecture, and {path} is only a file of weights. Name the architecture.")
    model = towers.load_clip(path) if config is None else towers.load_ancestor(path, config)
    choose_tokenizer(pairs, model.spec.tokenizer, settings.data.tokenizer, what=str(path))
    model.spec.require_tokenizer(str(path))
    return model


def _spec(settings: recipe.Recipe, pairs: PairSet, ancestor: Path | None) -> towers.ModelSpec:
    """The spec of the family's models: the ancestor's where it is there already."""
    known = ancestor if ancestor is not None else Path(settings.model.weights) if settings.model.weights is not None else None
    return load_ancestor(settings, known, pairs).spec if known is not None else fresh_spec(settings, pairs)


@dataclass(frozen=True)
class AncestorRole:
    """The ancestor: trained from scratch, or read from the recipe's weights."""

    settings: recipe.Recipe

    @property
    def evaluate_first(self) -> bool:
        return self.settings.model.weights is not None

    def check(self, pairs: PairSet) -> None:
        if self.settings.model.weights is None:
            fresh_spec(self.settings, pairs)

    def identity(self, pairs: PairSet) -> dict[str, Any]:
        weights = self.settings.model.weights
        if weights is not None:
            inputs = {"weights": file_digest(Path(weights), "recipe key model.weights")}
        else:
            inputs = {"model_spec": fresh_spec(self.settings, pairs).digest()}
        return {"role": "ancestor", "recipe": self.settings.used_by("ancestor"), "inputs": {"data_set": pairs.digest(), **inputs}}

    def build(self, context: Context) -> Stage:
        settings, training = self.settings, self.settings.ancestor
        if settings.model.weights is not None:
            model = load_ancestor(settings, Path(settings.model.weights), context.pairs)
            training = replace(training, steps=0)
        else:
            spec = fresh_spec(settings, context.pairs)
            model = towers.Bundle(spec, towers.build_clip(spec.config, seed=settings.seed).state_dict())
        return ClipStage("ancestor", model, training, context.device, seed=settings.seed)

    def stop(self, curve: Curve) -> bool:
        return False


def teacher_of(
    settings: recipe.Recipe, context: Context, model: towers.Bundle, ancestor: Path, features: Path | None, loss_key: str
) -> Teacher:
    """The ancestor that the loss at `loss_key` of the recipe compares with: computing every step, once for each pair of a pool, or cached.

    Raises:
        UserError: the recipe keeps features, and there are none; a pool is too large.
    """
    if not settings.engine.keep_features:
        live = LiveTeacher(model, context.device, shard=context.runtime.shard_ancestor, compiled=context.runtime.compile)
        loss, training = settings.comparisons()[loss_key]
        keeps = settings.keeps_teacher_pool(loss_key)
        if loss.teacher_pool is None or context.folder is None or not (is_walked_again(loss, training) or keeps):
            return live
        layout = Layout.of(model.spec.config, loss)
        require_budget(layout, loss.teacher_pool, context.runtime.teacher_pool_bytes, loss_key)
        kept_as = pool_identity(settings, context.pairs, ancestor) if keeps else None
        return PooledTeacher(live, PoolFile(context.folder, layout, loss.teacher_pool, kept_as=kept_as))
    if features is None:
        raise UserError("recipe key engine.keep_features needs --features. Give the folder that mmlg features wrote.")
    return CachedTeacher(features, model.spec, features_identity(settings, context.pairs, ancestor))


def features_identity(settings: recipe.Recipe, pairs: PairSet, ancestor: Path) -> dict[str, Any]:
    """What cached features are of: the ancestor, the data set and how its images are read, the precision."""
    inputs = {"data_set": pairs.digest(), "ancestor": file_digest(ancestor, "--ancestor-model"), "images": READING}
    return {"role": "features", "recipe": settings.used_by("features"), "inputs": inputs}


def pool_identity(settings: recipe.Recipe, pairs: PairSet, ancestor: Path) -> dict[str, Any]:
    """What the ancestor's outputs for a pool are of: cached features' identity, and which pairs, captions and crops are drawn."""
    identity = features_identity(settings, pairs, ancestor)
    drawn = settings.used_by("ancestor")
    return identity | {"role": "teacher pool", "recipe": identity["recipe"] | {key: drawn[key] for key in ("seed", "data")}}


def require_kept(features: Path | None, settings: recipe.Recipe) -> None:
    """Raise UserError where features are given that the recipe does not read."""
    if features is not None and not settings.engine.keep_features:
        raise UserError("--features is given, and recipe key engine.keep_features is false: they would not be read. Change either.")


def kept_teacher(settings: recipe.Recipe, context: Context, model: towers.Bundle, ancestor: Path, init: str, learngene: Path) -> Teacher:
    """The ancestor's outputs that the extraction of `learngene`, whose method is `init`, kept beside it.

    Raises:
        UserError: it kept none, or those of another ancestor, data set, seed or recipe.
    """
    loss = settings.extractions()[init].loss
    assert loss.teacher_pool is not None
    layout, identity = Layout.of(model.spec.config, loss), pool_identity(settings, context.pairs, ancestor)
    return KeptTeacher(model, PoolFile(learngene.parent, layout, loss.teacher_pool, kept_as=identity, finished=True))


@dataclass(frozen=True)
class DescendantRole:
    """A descendant (or a baseline at its size): written or drawn, evaluated untrained, trained, exported.

    A single tower is written and evaluated together with the ancestor's other tower, and not trained.

    Attributes:
        init: mmlg, direct, tleg, sws, scratch, even or distil. Descendants of direct pre-training are adapted without an ancestor.
        target_of: a finished scratch run: where the recipe says so, training stops once it is at that run's quality in two consecutive
            evaluations.
        features: what `mmlg features` wrote, where the recipe keeps features and this run compares with the ancestor.
    """

    settings: recipe.Recipe
    init: str
    size: recipe.Size
    ancestor: Path | None = None
    learngene: Path | None = None
    target_of: Path | None = None
    features: Path | None = None

    @property
    def evaluate_first(self) -> bool:
        return self.init in (*FROM_LEARNGENE, *FROM_ANCESTOR)

    @property
    def training(self) -> recipe.Training:
        """The loop's settings. Raises UserError where the recipe leaves the baseline out."""
        adaptation = self.settings.adaptation
        found: recipe.Training | None
        if self.init == "direct":
            found = adaptation.direct or replace(adaptation.training, steps=0)
        elif self.init in FROM_LEARNGENE:
            found = adaptation.training
        else:
            found = getattr(self.settings.baselines, self.init)
        if found is None:
            raise UserError(f"recipe key baselines.{self.init} is null: this baseline is left out. Give it settings to train it.")
        return found if self.size.modality == "both" else replace(found, steps=0)

    @property
    def weights(self) -> recipe.DistillationLoss | None:
        """The terms that compare with the ancestor, where training has any."""
        if not self.training.steps or self.init == "direct":
            return None
        if self.init in FROM_LEARNGENE:
            return self.settings.adaptation.loss
        baselines = self.settings.baselines
        return {"distil": baselines.distil_loss, "even": baselines.even_loss}.get(self.init)

    @property
    def reuses_teacher_pool(self) -> bool:
        """Whether what the extraction kept of the ancestor's outputs takes the ancestor's place."""
        return self.weights is not None and self.init in FROM_LEARNGENE and self.settings.reuses_teacher_pool

    @property
    def _loss_key(self) -> str:
        return "adaptation.loss" if self.init in FROM_LEARNGENE else f"baselines.{self.init}_loss"

    @property
    def needs_ancestor(self) -> bool:
        """Whether the ancestor is read."""
        return self.init in FROM_ANCESTOR or self.size.modality != "both" or self.weights is not None

    def check(self, pairs: PairSet) -> None:
        for name, given, needed in (
            ("--ancestor-model", self.ancestor, self.needs_ancestor),
            ("--learngene", self.learngene, self.init in FROM_LEARNGENE),
        ):
            if needed and given is None:
                raise UserError(f"--init {self.init} needs {name}. Give what mmlg train or mmlg extract wrote.")
        if self.learngene is not None and self.init not in FROM_LEARNGENE:
            raise UserError(f"--learngene is not read by --init {self.init}. Leave it out, or use --init {' or '.join(FROM_LEARNGENE)}.")
        if self.target_of is not None and not self.settings.family.stop_at_target:
            raise UserError("--target-of is given, and recipe key family.stop_at_target is false: the run would not stop. Change either.")
        if self.weights is not None:
            require_kept(self.features, self.settings)
        if self.size.modality != "both" and self.init != "mmlg":
            raise UserError(f"--modality {self.size.modality} can only be written from a learngene. Use --init mmlg.")

    @property
    def target(self) -> float | None:
        """The quality at which training stops. Raises UserError where the scratch run is not complete or does not have the metric."""
        if self.target_of is None or not self.settings.family.stop_at_target:
            return None
        result, metric = result_of(self.target_of), self.settings.evaluation.metric
        if result is None:
            raise UserError(f"--target-of {self.target_of} is not a complete run. Give the folder of a finished scratch run.")
        curve = RunResult.from_json(result, str(self.target_of / RESULT_FILE)).curve
        if not curve or metric not in curve[-1]:
            raise UserError(f"--target-of {self.target_of} was not evaluated by {metric}. Train it again, or use another metric.")
        return float(curve[-1][metric])

    def identity(self, pairs: PairSet) -> dict[str, Any]:
        inputs = {"data_set": pairs.digest()}
        if self.init in FROM_LEARNGENE:
            assert self.learngene is not None
            inputs["learngene"] = file_digest(self.learngene, "--learngene")
        elif not self.needs_ancestor:
            inputs["model_spec"] = _spec(self.settings, pairs, self.ancestor).digest()
        if self.needs_ancestor:
            assert self.ancestor is not None
            inputs["ancestor"] = file_digest(self.ancestor, "--ancestor-model")
        size = {key: value for key, value in asdict(self.size).items() if key != "in_sum"}
        target = self.target
        used = self.settings.used_by("descendant", init=self.init, has_target=target is not None)
        if self.size.modality != "both":
            used.pop("adaptation", None)  # a single tower is not trained
        return {
            "role": "descendant",
            "init": self.init,
            "size": size,
            "target": target,
            "recipe": used,
            "inputs": inputs,
        }

    def build(self, context: Context) -> Stage:
        settings, weights = self.settings, self.weights
        ancestor = None
        if self.needs_ancestor:
            assert self.ancestor is not None
            ancestor = load_ancestor(settings, self.ancestor, context.pairs)
        gene = self._learngene(ancestor, context.pairs)
        if self.size.modality != "both":
            assert gene is not None
            assert ancestor is not None
            return TowerStage(gene.descend(**self.size.sizes(), modality=self.size.modality), ancestor, context.device)
        known = gene or ancestor
        spec = known.spec if known is not None else _spec(settings, context.pairs, self.ancestor)
        state = initialise(
            self.init,
            config=spec.config,
            sizes=self.size.sizes(),
            ancestor_state=ancestor.state if ancestor is not None else None,
            learngene=gene,
            seed=settings.seed,
        )
        teacher = None
        if weights is not None:
            assert ancestor is not None
            assert self.ancestor is not None
            if self.reuses_teacher_pool:
                assert self.learngene is not None
                teacher = kept_teacher(settings, context, ancestor, self.ancestor, self.init, self.learngene)
            else:
                teacher = teacher_of(settings, context, ancestor, self.ancestor, self.features, self._loss_key)
        own = towers.Bundle(spec.sized(**self.size.sizes()), state)
        return ClipStage(self.init, own, self.training, context.device, teacher=teacher, weights=weights, seed=settings.seed)

    def _learngene(self, ancestor: towers.Bundle | None, pairs: PairSet) -> Learngene | None:
        """The learngene, which must agree with the ancestor and the data set."""
        if self.init not in FROM_LEARNGENE:
            return None
        assert self.learngene is not None
        gene = load_learngene(self.learngene)
        choose_tokenizer(pairs, gene.spec.tokenizer, self.settings.data.tokenizer, what=str(self.learngene))
        if ancestor is not None:
            _check_agree(gene.spec, ancestor.spec, self.learngene)
        return gene

    def stop(self, curve: Curve) -> bool:
        target = self.target
        return target is not None and first_reached(curve, target, self.settings.evaluation.metric) is not None


def _check_agree(gene: towers.ModelSpec, ancestor: towers.ModelSpec, file: Path) -> None:
    """Raise UserError where a learngene and the ancestor that its descendants are compared with want different inputs."""
    for what, one, other in (
        ("tokenizer", towers.told(gene.tokenizer), towers.told(ancestor.tokenizer)),
        ("preprocessing", _as_text(gene.preprocess.to_config()), _as_text(ancestor.preprocess.to_config())),
        ("input size", str((gene.image_size, gene.context_length)), str((ancestor.image_size, ancestor.context_length))),
    ):
        if one != other:
            raise UserError(f"{file} has another {what} than the ancestor ({one}; {other}). Give the ancestor that it was extracted from.")


def _as_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)

"""The roles that train a learngene: extraction out of an ancestor, and pre-training on the pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mmlg_scale import recipe, towers
from mmlg_scale.data.corpus import PairSet, choose_tokenizer
from mmlg_scale.digests import file_digest
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.file import Learngene, load_learngene
from mmlg_scale.learngene.inherit import inherit
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.ranks import on_first_rank
from mmlg_scale.training.loop import Curve
from mmlg_scale.training.roles import Context, fresh_spec, load_ancestor, recipe_config, require_kept, teacher_of
from mmlg_scale.training.sizes import most_layers
from mmlg_scale.training.stages import ElasticStage, ExtractionStage, Stage


@dataclass(frozen=True)
class ExtractionRole:
    """Distilling a learngene out of the ancestor; `method` is mmlg, or tleg or sws with the settings of the recipe's baselines."""

    settings: recipe.Recipe
    ancestor: Path
    method: str = "mmlg"
    features: Path | None = None
    evaluate_first: ClassVar[bool] = False

    @property
    def extraction(self) -> recipe.Extraction:
        """The method's settings. Raises UserError where the recipe leaves them out."""
        found = self.settings.extractions().get(self.method)
        if found is None:
            raise UserError(f"recipe key baselines.{self.method} is null: this baseline is left out. Give it settings to extract it.")
        return found

    @property
    def _section(self) -> str:
        return recipe.section_of(self.method)

    def check(self, pairs: PairSet) -> None:
        require_kept(self.features, self.settings)
        config = recipe_config(self.settings)
        if config is not None:
            with recipe.in_section(self._section):
                most_layers(self.extraction, config)

    def identity(self, pairs: PairSet) -> dict[str, Any]:
        inputs = {"data_set": pairs.digest(), "ancestor": file_digest(self.ancestor, "--ancestor-model")}
        used = self.settings.used_by("extraction", init=self.method)
        return {"role": "extraction", "method": self.method, "recipe": used, "inputs": inputs}

    def build(self, context: Context) -> Stage:
        model, extraction = load_ancestor(self.settings, self.ancestor, context.pairs), self.extraction
        with recipe.in_section(self._section):
            structure = Structure(model.spec.config, **{key: getattr(extraction, key) for key in Structure.SETTINGS})
            most_layers(extraction, model.spec.config)
        fitted = None
        if extraction.start == "fitted" and not context.resumes:
            fitted = on_first_rank(lambda: inherit(structure, model.state))
        return ExtractionStage(
            extraction,
            AuxiliaryCLIP.from_ancestor(model.state, structure, seed=self.settings.seed, fitted=fitted),
            teacher_of(self.settings, context, model, self.ancestor, self.features, f"{self._section}.loss"),
            context.device,
            seed=self.settings.seed,
            compose_per_layer=context.runtime.compose_per_layer,
        )

    def stop(self, curve: Curve) -> bool:
        return False


@dataclass(frozen=True)
class PretrainingRole:
    """A learngene trained on the pairs themselves, without an ancestor: from random weights, or the training of one is continued.

    Attributes:
        learngene: the file of the one whose training is continued, of whatever method with the recipe's structure.
        method: with the settings of this method's continuation in place of pretraining's.
    """

    settings: recipe.Recipe
    learngene: Path | None = None
    method: str | None = None
    evaluate_first: ClassVar[bool] = False

    @property
    def pretraining(self) -> recipe.Pretraining:
        """Its settings. Raises UserError where the recipe leaves them out, or there is no learngene to continue from."""
        if self.method is None:
            if self.settings.pretraining is None:
                raise UserError(
                    "recipe key pretraining is null: direct pre-training is left out. Give it settings, or {} for the defaults."
                )
            return self.settings.pretraining
        found = self.settings.continuations().get(self.method)
        if found is None:
            key = f"{self._section}.continuation"
            raise UserError(f"recipe key {key} is null: that learngene is not trained further. Give it settings, or {{}} for the defaults.")
        return found

    @property
    def _section(self) -> str:
        """The key below which the structure is."""
        return "pretraining" if self.method is None else recipe.section_of(self.method)

    def check(self, pairs: PairSet) -> None:
        settings, pretraining = self.settings, self.pretraining
        if self.method is not None and self.learngene is None:
            raise UserError(f"--method {self.method} continues the training of a learngene. Give --learngene, or leave --method out.")
        if self.learngene is None:
            config: Mapping[str, Any] | None = fresh_spec(settings, pairs).config
        elif self.method is None:
            config = self._start(self.learngene, pairs).spec.config
        else:
            config = recipe_config(settings)  # of a family whose extraction is still to come
        if config is not None:
            with recipe.in_section(self._section):
                most_layers(pretraining, config)

    def identity(self, pairs: PairSet) -> dict[str, Any]:
        inputs = {"data_set": pairs.digest()}
        if self.learngene is None:
            inputs["model_spec"] = fresh_spec(self.settings, pairs).digest()
        else:
            self._start(self.learngene, pairs)
            inputs["learngene"] = file_digest(self.learngene, "--learngene")
        used = replace(self.settings, pretraining=self.pretraining).used_by("pretraining")
        return {"role": "pretraining", "recipe": used, "inputs": inputs}

    def build(self, context: Context) -> Stage:
        settings, pretraining = self.settings, self.pretraining
        start = None if self.learngene is None else self._start(self.learngene, context.pairs)
        spec = fresh_spec(settings, context.pairs) if start is None else start.spec
        with recipe.in_section(self._section):
            structure = Structure(spec.config, **{key: getattr(pretraining, key) for key in Structure.SETTINGS})
            most_layers(pretraining, spec.config)
        if start is None:
            auxiliary = AuxiliaryCLIP.fresh(structure, seed=settings.seed)
        else:
            auxiliary = AuxiliaryCLIP.of_tensors(structure, start.tensors)
        per_layer = context.runtime.compose_per_layer
        return ElasticStage(pretraining, auxiliary, spec, context.device, seed=settings.seed, compose_per_layer=per_layer)

    def _start(self, file: Path, pairs: PairSet) -> Learngene:
        """The learngene that is trained further.

        Raises:
            UserError: it reads other captions than the data set's, or is of another architecture or structure than the recipe's.
        """
        gene, config = load_learngene(file), recipe_config(self.settings)
        choose_tokenizer(pairs, gene.spec.tokenizer, self.settings.data.tokenizer, what=str(file))
        difference = None if config is None else towers.first_difference(gene.spec.config, config)
        found = [] if difference is None else [(f"model.config.{difference[0]}", difference[1], difference[2])]
        found += [(f"{self._section}.{key}", getattr(gene.structure, key), getattr(self.pretraining, key)) for key in Structure.SETTINGS]
        for key, theirs, ours in found:
            if theirs != ours:
                told = "null" if theirs is None else theirs
                raise UserError(f"recipe key {key}: is {'null' if ours is None else ours}, {file} has {told}. Use what the file has.")
        return gene

    def stop(self, curve: Curve) -> bool:
        return False

"""One small example of everything that a command reads: a data set, a model, a learngene, runs, cached features, a family."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import summarise
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.records import write_record
from mmlg_scale.results import FamilyResult
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import loop
from mmlg_scale.training.learngene_roles import ExtractionRole
from mmlg_scale.training.roles import AncestorRole
from mmlg_scale.training.run import run_role, write_features
from tests.test_report import raw_family
from tests.training.tiny import ANY_SIZE

CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
}
RUNTIME = Runtime(checkpoint_every=1, trackers=["jsonl"])


def settings_for(data: Path) -> recipe.Recipe:
    """Two steps, a checkpoint after each."""
    return recipe.Recipe(
        data=recipe.Data(path=str(data)),
        model=recipe.Model(config=CONFIG),
        ancestor=recipe.Training(steps=2, batch_size=8, eval_every=2),
    )


class Artefacts:
    """Written below `root` once; nobody changes them."""

    def __init__(self, root: Path) -> None:
        self.data, self.model, self.gene = root / "data", root / "model", root / "gene"
        self.run, self.under_way, self.features, self.family = (root / name for name in ("run", "under-way", "features", "family"))
        self.extraction, self.pool = root / "extraction", root / "pool"
        write_scenes(self.data, num_train=24, num_val=4, num_test=6, seed=0, image_size=32, samples_per_shard=12)
        self.settings = settings_for(self.data)
        tokenizer = open_pairs(self.data).tokenizer
        assert tokenizer is not None
        config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": tokenizer.vocab_size}}
        self.spec = towers.ModelSpec(towers.model_config(config), tokenizer=tokenizer)
        bundle = towers.Bundle(self.spec, towers.build_clip(self.spec.config, seed=3).state_dict())
        towers.export(bundle, self.model)
        auxiliary = AuxiliaryCLIP.from_ancestor(bundle.state, Structure(self.spec.config, num_knots=2), seed=0)
        gene = Learngene.from_auxiliary(auxiliary.structure, auxiliary.state_dict(), spec=self.spec, extraction={}, trained=ANY_SIZE)
        gene.save(self.gene / "learngene.safetensors")
        self._train()
        self.keeping = dataclasses.replace(self.settings, engine=recipe.Engine(keep_features=True))
        write_features(self.keeping, self.model, self.features, RUNTIME)
        run_role(ExtractionRole(self.reusing, self.model), self.extraction, RUNTIME)
        shutil.copytree(self.extraction / "teacher-pool", self.pool / "teacher-pool")
        self.family.mkdir()
        write_record(self.family / "family.json", summarise(FamilyResult.from_json(raw_family(), "")).to_json())
        shown = [{"caption": "a ring", "results": [{"png_base64": "AA==", "correct": True, "score": 0.5}]}]
        write_record(self.family / "retrieval_samples.json", {"samples": shown})

    @property
    def reusing(self) -> recipe.Recipe:
        """An extraction that meets each of the 24 training pairs once, and keeps the ancestor's outputs for the adaptation."""
        training = recipe.Training(steps=3, batch_size=8, eval_every=3)
        loss = recipe.DistillationLoss(teacher_pool=24)
        return dataclasses.replace(
            self.settings,
            extraction=recipe.Extraction(min_layers=1, num_knots=2, start="random", training=training, loss=loss),
            adaptation=recipe.Adaptation(training, loss, reuse_teacher_pool=True),
        )

    def _train(self) -> None:
        """A run to its end, and one that stops after the first of its two steps."""
        run_role(AncestorRole(self.settings), self.run, RUNTIME)

        def until_second(stage: Any, engine: Any, batch: Any, step: int) -> Any:
            if step == 1:
                raise UserError("stopped by the test")
            return step_once(stage, engine, batch, step)

        step_once = loop.train_step
        with mock.patch.object(loop, "train_step", until_second):
            try:
                run_role(AncestorRole(self.settings), self.under_way, RUNTIME)
            except UserError as error:
                assert str(error) == "stopped by the test"  # noqa: PT017 (anything else is a fault of this module)
        assert (self.under_way / "checkpoints" / "step-00000001").is_dir()

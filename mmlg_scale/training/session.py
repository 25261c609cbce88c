"""Model, engine and data of a role, assembled without a folder: what runs, benchmarks and notebooks start from.

For example, in a notebook:

    recipe, runtime = load_recipe("demo", **{"data.path": "runs/demo/data"})
    session = build_session(recipe, runtime=runtime)
    for step, batch in zip(range(10), session.stream()):
        print(session.train_step(batch, step).item())
    session.close()
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmlg_scale import recipe
from mmlg_scale.data.corpus import Corpus, PairSet, pairs_of
from mmlg_scale.data.evaluation import EvalSplit
from mmlg_scale.data.pipeline import Batch, StreamSettings, TrainStream
from mmlg_scale.evaluation.evaluate import evaluate_pairs, require_metric
from mmlg_scale.ranks import several_ranks
from mmlg_scale.runtime import Runtime
from mmlg_scale.training.engine import Engine, start_ranks, stop_ranks
from mmlg_scale.training.loop import train_step
from mmlg_scale.training.roles import AncestorRole, Context, Role
from mmlg_scale.training.stages import Stage


@dataclass
class Session:
    """A stage under its engine, and the data set as its model reads it."""

    settings: recipe.Recipe
    runtime: Runtime
    stage: Stage
    engine: Engine
    corpus: Corpus
    owns_ranks: bool = True
    """No group of ranks was there before; `close` leaves it."""

    def eval_split(self, split: str) -> EvalSplit:
        """A whole split, decoded and tokenised for the model."""
        found = self.corpus.eval_split(split, max_bad_fraction=self.settings.data.max_bad_fraction)
        require_metric(self.settings.evaluation.metric, found, f"{self.corpus.pairs.where}/{split}")
        return found

    def stream(self, start_step: int = 0, record: Path | None = None) -> TrainStream:
        """This rank's batches from `start_step` on; what is skipped is listed in the folder `record`."""
        data = self.settings.data
        settings = StreamSettings(
            global_batch_size=self.stage.training.batch_size,
            seed=self.settings.seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            num_workers=self.runtime.num_workers,
            augment=data.augment,
            aug_cfg=data.aug_cfg,
            cache_decoded=self.runtime.cache_decoded,
            check=data.check,
            max_bad_fraction=data.max_bad_fraction,
            pool=self.stage.pool,
            captions_per_image=data.captions_per_image,
        )
        return self.corpus.stream(settings, start_step, record=record)

    def train_step(self, batch: Batch, step: int) -> Tensor:
        """One optimiser step on this rank's batch; returns its loss, detached. Collective."""
        return train_step(self.stage, self.engine, batch, step)[0]

    @torch.no_grad()
    def evaluate(self, split: EvalSplit) -> dict[str, float]:
        """Metrics of the present weights; several sizes are averaged, and each is given under `.../iA-tB` too. Collective."""
        model: nn.Module = self.engine.model
        was_training = model.training
        model.eval()
        total: dict[str, float] = {}
        sizes = self.stage.evaluated_sizes()
        with self.engine.autocast():
            for size_name, size in sizes.items():
                metrics = evaluate_pairs(
                    functools.partial(_encode, model, "image", size),
                    functools.partial(_encode, model, "text", size),
                    split,
                    self.stage.spec.preprocess,
                    self.engine.device,
                    classes=self.corpus.classes,
                    tokenize=self.corpus.tokenize,
                )
                for name, value in metrics.items():
                    total[name] = total.get(name, 0.0) + value / len(sizes)
                    if size_name:
                        total[f"{name}/{size_name}"] = value
        model.train(was_training)
        return total

    def close(self) -> None:
        """Release the engine, and leave the group of ranks that was joined for it."""
        self.engine.close()
        if self.owns_ranks:
            stop_ranks()


def _encode(model: nn.Module, tower: str, size: Mapping[str, int], inputs: Tensor) -> Tensor:
    return model(**{tower: inputs}, **size)[f"{tower}_features"]


def build_session(
    settings: recipe.Recipe,
    role: Role | None = None,
    *,
    runtime: Runtime | None = None,
    pairs: PairSet | None = None,
    resumes: bool = False,
    folder: Path | None = None,
) -> Session:
    """Assemble a role (the ancestor where none is given), joining the ranks where that has not happened. Collective.

    With `resumes` the caller loads a checkpoint next, and the weights until then are not those of a start. In `folder` the ancestor's
    outputs for a teacher_pool are kept; without one it computes them in every pass.

    Raises:
        UserError: whatever of recipe, data set and models does not go together.
    """
    runtime = runtime if runtime is not None else Runtime()
    chosen: Role = role if role is not None else AncestorRole(settings)
    pairs = pairs if pairs is not None else pairs_of(settings.data)
    chosen.check(pairs)
    is_own = not dist.is_initialized()
    device = start_ranks(runtime)
    try:
        stage = chosen.build(Context(pairs, runtime, device, resumes, folder))
        training = stage.training
        engine = Engine(
            stage.model,
            stage.parameter_groups(),
            runtime=runtime,
            batch_size=training.batch_size,
            optimizer=training.optimizer,
            precision=settings.engine.precision,
            communication=settings.engine.communication,
        )
        return Session(settings, runtime, stage, engine, Corpus(pairs, stage.spec), is_own)
    except Exception:
        if is_own and not several_ranks():
            stop_ranks()
        raise

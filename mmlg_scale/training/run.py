"""One training run in a folder of its own: role -> stage -> loop -> exported model and result.json.

result.json holds the curve (validation split), the metrics at step 0 and at the end (test split), and what the run cost.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import first_reached
from mmlg_scale.data.pipeline import EvalSplit, TrainStream, load_eval_split
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.sweep import Sweep
from mmlg_scale.data.tokens import Tokenizer, load_tokenizer
from mmlg_scale.errors import UserError
from mmlg_scale.evaluation.evaluate import evaluate_pairs
from mmlg_scale.files import write_json_atomic
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.baselines import FROM_ANCESTOR, FROM_LEARNGENE, initialise
from mmlg_scale.learngene.file import Learngene, load_learngene
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.training import features
from mmlg_scale.training.checkpoint import Checkpoints, claim_run_folder
from mmlg_scale.training.engine import Engine, autocast_of, start_ranks, stop_ranks
from mmlg_scale.training.loop import Curve, Progress, train
from mmlg_scale.training.meters import Meters
from mmlg_scale.training.stages import Ancestor, ClipStage, ExtractionStage, Stage, Teacher


@dataclass
class Corpus:
    """A data set with its tokenizer, as runs use it."""

    root: Path
    tokenizer: Tokenizer
    config: dict[str, Any]
    """The ancestor's open_clip configuration, its vocabulary size filled in."""

    def eval_split(self, settings: recipe.Data, split: str) -> EvalSplit:
        sizes = self._sizes()
        return load_eval_split(self.root / split, self.tokenizer, *sizes, max_bad_fraction=settings.max_bad_fraction)

    def stream(self, settings: recipe.Data, batch_size: int, seed: int, start_step: int, record: Path) -> TrainStream:
        """This rank's batches; what is skipped is listed in the folder `record`."""
        image_size, context_length = self._sizes()
        return TrainStream(
            self.root / "train",
            self.tokenizer,
            image_size=image_size,
            context_length=context_length,
            global_batch_size=batch_size,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            seed=seed,
            num_workers=settings.num_workers,
            augment=settings.augment,
            start_step=start_step,
            check=settings.check,
            max_bad_fraction=settings.max_bad_fraction,
            record=record,
        )

    def sweep(self) -> Sweep:
        """The training split once, as it stands."""
        return Sweep(ShardReader(self.root / "train"), self.tokenizer, *self._sizes())

    @functools.cached_property
    def classes(self) -> dict[str, list[str]] | None:
        """Class names and caption templates, where the set has classes."""
        file = self.root / "classes.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids at the model's context length."""
        return self.tokenizer(texts, self._sizes()[1])

    def _sizes(self) -> tuple[int, int]:
        return towers.image_size(self.config), towers.context_length(self.config)


def open_corpus(settings: recipe.Recipe) -> Corpus:
    """The data set at the recipe's data.path with the recipe's architecture, a vocabulary size left out taken from the tokenizer."""
    if settings.data.path is None:
        raise UserError("recipe key data.path is null. Write a data set with mmlg data scenes or mmlg data pack and give --data.path DIR.")
    data_root = Path(settings.data.path)
    if not (data_root / "dataset.json").is_file():
        raise UserError(f"recipe key data.path: {data_root} holds no data set. mmlg data scenes or mmlg data pack writes one.")
    tokenizer = load_tokenizer(data_root)
    config = json.loads(json.dumps(settings.model.config)) if settings.model.config is not None else settings.model.architecture
    if isinstance(config, dict) and isinstance(config.get("text_cfg"), dict):
        config["text_cfg"].setdefault("vocab_size", tokenizer.vocab_size)
    config = towers.model_config(config)
    if settings.model.loss == "siglip":
        config = towers.with_logit_bias(config)
    vocabulary = config["text_cfg"]["vocab_size"]
    if tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"the tokenizer of {data_root} has {tokenizer.vocab_size} tokens, recipe key model has vocab_size {vocabulary}. "
            "Leave vocab_size out to take the tokenizer's."
        )
    return Corpus(data_root, tokenizer, config)


def train_ancestor(settings: recipe.Recipe, out: Path) -> dict[str, Any]:
    """Train the ancestor, or take the recipe's weights; writes OUT/model (an open_clip folder) and OUT/result.json; returns the result."""
    weights = settings.model.weights

    def build(run: Run) -> Stage:
        config, training = run.corpus.config, settings.ancestor
        if weights is not None:
            config, state = towers.load_ancestor(Path(weights), config)
            training = replace(training, steps=0)
        else:
            state = towers.build_clip(config, seed=settings.seed).state_dict()
        return ClipStage("ancestor", config, state, training, run.device, seed=settings.seed)

    return Run(settings, out, {"role": "ancestor"}).execute(build, _export_clip, evaluate_first=weights is not None)


def write_features(settings: recipe.Recipe, ancestor: Path, out: Path) -> dict[str, Any]:
    """Write the features that the open_clip folder `ancestor` gives the training split to `out`; see `features`."""
    corpus = open_corpus(settings)
    config, state = towers.load_ancestor(ancestor, corpus.config)
    of = features.identity(state, corpus.root / "train", settings.engine.precision)

    def work(run: Run) -> dict[str, Any]:
        found = features.compute_features(
            Teacher(config, state, run.device),
            corpus.sweep(),
            out,
            autocast=functools.partial(autocast_of, settings.engine.precision, run.device),
            device=run.device,
            num_workers=settings.data.num_workers,
        )
        if dist.get_rank() == 0:
            write_json_atomic(out / "result.json", {**of, **found})
            print(f"{out}: features of {found['num_images']} images and {found['num_captions']} captions")
        return {**of, **found}

    return Run(settings, out, of, whole_recipe=False).perform(work)


def extract(
    settings: recipe.Recipe, ancestor: Path, out: Path, *, method: str = "mmlg", kept_features: Path | None = None
) -> dict[str, Any]:
    """Distil the learngene out of the open_clip folder `ancestor`; writes OUT/learngene.safetensors and OUT/result.json.

    Args:
        method: mmlg, or tleg or sws where the recipe's baselines hold their settings.
        kept_features: what `write_features` wrote, where the recipe keeps features.
    """
    extraction = settings.extraction if method == "mmlg" else settings.baselines.learngenes().get(method)
    if extraction is None:
        raise UserError(f"recipe key baselines.{method} is null: this baseline is left out. Give it settings to extract it.")

    def build(run: Run) -> Stage:
        config, state = towers.load_ancestor(ancestor, run.corpus.config)
        auxiliary = AuxiliaryCLIP.from_ancestor(state, _structure(config, extraction), seed=settings.seed)
        teacher = run.teacher(config, state, kept_features)
        return ExtractionStage(extraction, auxiliary, teacher, run.device, seed=settings.seed)

    def finish(run: Run, stage: Stage, state: Mapping[str, Tensor]) -> dict[str, Any]:
        assert isinstance(stage, ExtractionStage)
        learngene = Learngene.from_auxiliary(
            stage.auxiliary.structure,
            stage.auxiliary_state(state),
            tokenizer_files=run.corpus.tokenizer.files,
            extraction=asdict(extraction),
        )
        learngene.save(run.out / "learngene.safetensors")
        return {
            "params": learngene.num_params,
            "bytes": (run.out / "learngene.safetensors").stat().st_size,
            "block_params": learngene.block_params,
            "stem_params": learngene.stem_params,
        }

    return Run(settings, out, {"role": "extraction", "method": method}).execute(build, finish)


def _structure(config: dict[str, Any], extraction: recipe.Extraction) -> Structure:
    return Structure(
        config,
        num_multimodal=extraction.num_multimodal,
        num_unimodal=extraction.num_unimodal,
        num_knots=extraction.num_knots,
        basis=extraction.basis,
        convention=extraction.convention,
        width_map=extraction.width_map,
    )


def train_descendant(
    settings: recipe.Recipe,
    out: Path,
    *,
    init: str,
    size: recipe.Size,
    ancestor: Path | None = None,
    learngene: Path | None = None,
    target_of: Path | None = None,
    kept_features: Path | None = None,
) -> dict[str, Any]:
    """Write a descendant (or a baseline at its size), evaluate it as written, train it, export it to OUT/model.

    A single tower is written and evaluated together with the ancestor's other tower, and not trained.

    Args:
        init: mmlg, tleg, sws, scratch, even or distil.
        target_of: a finished scratch run: where the recipe says so, training stops once it is at that run's quality in two
            consecutive evaluations.
        kept_features: what `write_features` wrote, where the recipe keeps features and this run compares with the ancestor.
    """
    training, weights = _training_of(settings, init)
    for name, given, needed in (
        ("--ancestor-model", ancestor, init == "even" or size.modality != "both" or (weights is not None and training.steps > 0)),
        ("--learngene", learngene, init in FROM_LEARNGENE),
    ):
        if needed and given is None:
            raise UserError(f"--init {init} needs {name}. Give what mmlg train or mmlg extract wrote.")
    if size.modality != "both":
        if init != "mmlg":
            raise UserError(f"--modality {size.modality} is written from a learngene alone. Use --init mmlg.")
        training = replace(training, steps=0)

    def build(run: Run) -> Stage:
        own, state = _first_weights(run, init, size, ancestor, learngene)
        teacher = None
        if weights is not None and training.steps:
            assert ancestor is not None
            teacher = run.teacher(*towers.load_ancestor(ancestor, run.corpus.config), kept_features)
        kept = weights if teacher else None
        return ClipStage(init, own, state, training, run.device, teacher=teacher, weights=kept, seed=settings.seed)

    metric = settings.evaluation.metric
    target: float | None = None
    if target_of is not None and settings.family.stop_at_target:
        target = json.loads((target_of / "result.json").read_text())["curve"][-1][metric]

    def stop(curve: Curve) -> bool:
        return target is not None and first_reached(curve, target, metric) is not None

    identity = {"role": "descendant", "init": init, "size": asdict(size)}
    finish: Finish = _export_clip
    if size.modality != "both":
        assert learngene is not None
        finish = functools.partial(_export_tower, size=size, learngene=learngene)
    return Run(settings, out, identity).execute(build, finish, stop=stop, evaluate_first=init in (*FROM_LEARNGENE, *FROM_ANCESTOR))


def _first_weights(
    run: Run, init: str, size: recipe.Size, ancestor: Path | None, learngene: Path | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict before training; a single tower is paired with the ancestor's other one."""
    config = run.corpus.config
    gene = load_learngene(learngene) if learngene is not None else None
    needs_ancestor = init in FROM_ANCESTOR or size.modality != "both"
    ancestor_state = towers.load_ancestor(ancestor, config)[1] if ancestor is not None and needs_ancestor else None
    state = initialise(
        init,
        config=config,
        sizes=size.sizes(),
        ancestor_state=ancestor_state,
        learngene=gene,
        seed=run.settings.seed,
    )
    own = towers.with_sizes(config, **size.sizes())
    if size.modality == "both":
        return own, state
    assert ancestor_state is not None
    own_image = size.modality == "image"
    pair = {name: tensor for name, tensor in ancestor_state.items() if name.startswith("visual.") != own_image}
    pair |= {name: tensor for name, tensor in state.items() if name.startswith("visual.") == own_image and not name.startswith("logit_")}
    return own, pair


def _training_of(settings: recipe.Recipe, init: str) -> tuple[recipe.Training, recipe.DistillationLoss | None]:
    if init in FROM_LEARNGENE:
        return settings.adaptation.training, settings.adaptation.loss
    training = getattr(settings.baselines, init)
    if training is None:
        raise UserError(f"recipe key baselines.{init} is null: this baseline is left out. Give it settings to train it.")
    return training, settings.baselines.distil_loss if init == "distil" else None


def _export_tower(run: Run, stage: Stage, state: Mapping[str, Tensor], *, size: recipe.Size, learngene: Path) -> dict[str, Any]:
    descendant = load_learngene(learngene).descend(**size.sizes(), modality=size.modality)
    config = descendant.config
    descendant.export(run.out / "model", overwrite=True)
    return {
        "params": sum(tensor.numel() for tensor in descendant.state.values()),
        "image_layers": size.image_layers if size.modality == "image" else None,
        "text_layers": size.text_layers if size.modality == "text" else None,
        "image_width": towers.width(config, "image"),
        "text_width": towers.width(config, "text"),
    }


def _export_clip(run: Run, stage: Stage, state: Mapping[str, Tensor]) -> dict[str, Any]:
    assert isinstance(stage, ClipStage)
    clip_state = stage.clip_state(state)
    towers.export(clip_state, stage.config, run.out / "model", tokenizer_files=run.corpus.tokenizer.files, overwrite=True)
    return {
        "params": sum(tensor.numel() for tensor in clip_state.values()),
        "image_layers": towers.num_layers(stage.config, "image"),
        "text_layers": towers.num_layers(stage.config, "text"),
        "image_width": towers.width(stage.config, "image"),
        "text_width": towers.width(stage.config, "text"),
    }


Build = Callable[["Run"], Stage]
Finish = Callable[["Run", Stage, Mapping[str, Tensor]], dict[str, Any]]


class Run:
    """One run folder and what all roles do alike: claim it, build, train or resume, evaluate, export, write result.json."""

    def __init__(self, settings: recipe.Recipe, out: Path, identity: Mapping[str, Any], *, whole_recipe: bool = True) -> None:
        self.settings, self.out, self.identity = settings, out, dict(identity)
        if whole_recipe:
            self.identity["recipe"] = settings.to_dict()
            del self.identity["recipe"]["data"]["path"]  # a data set may be moved

    kept: features.KeptFeatures | None = None
    """The ancestor's features, where the run reads them."""

    def execute(
        self,
        build: Build,
        finish: Finish,
        *,
        stop: Callable[[Curve], bool] = lambda curve: False,
        evaluate_first: bool = False,
    ) -> dict[str, Any]:
        """Train to the end and return the result; a complete folder returns its result at once."""
        return self.perform(lambda run: run._train(build, finish, stop, evaluate_first))

    def perform(self, work: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        """Do the folder's work, between the ranks' start and end, and return its result; that of a complete folder at once."""
        self.corpus = open_corpus(self.settings)
        self.device = start_ranks(self.settings.engine)
        try:
            result = self._claim()
            return result if result is not None else work(self)
        finally:
            stop_ranks()

    def teacher(self, config: dict[str, Any], state: Mapping[str, Tensor], kept_features: Path | None) -> Ancestor:
        """The ancestor that a loss compares with, or its kept features.

        Raises:
            UserError: the recipe keeps features, and there are none.
        """
        engine = self.settings.engine
        if not engine.keep_features:
            return Teacher(config, state, self.device, shard=engine.shard_ancestor)
        if kept_features is None:
            raise UserError("recipe key engine.keep_features needs --features. Give the folder that mmlg features wrote.")
        self.kept = features.KeptFeatures(kept_features, config, features.identity(state, self.corpus.root / "train", engine.precision))
        return self.kept

    def _claim(self) -> dict[str, Any] | None:
        """Rank 0 claims the folder and tells the others; a UserError is raised on every rank."""
        answer: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                answer[0] = claim_run_folder(self.out, self.identity)
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def _train(self, build: Build, finish: Finish, stop: Callable[[Curve], bool], evaluate_first: bool) -> dict[str, Any]:
        stage = build(self)
        training = stage.training
        preprocess = towers.Preprocess()
        validation, test = (self.corpus.eval_split(self.settings.data, split) for split in ("val", "test"))
        engine = Engine(
            stage.model,
            stage.parameter_groups(),
            settings=self.settings.engine,
            batch_size=training.batch_size,
            optimizer=training.optimizer,
        )
        meters = Meters(self.out, training.steps, name=stage.name, device=self.device, enabled=dist.get_rank() == 0)

        def evaluate(split: EvalSplit) -> dict[str, float]:
            return evaluate_sizes(engine, stage, split, preprocess, self.corpus)

        at_start = self.out / "metrics_at_0.json"
        if evaluate_first and not at_start.exists() and not Checkpoints(self.out).steps():
            metrics = evaluate(test)
            if dist.get_rank() == 0:
                write_json_atomic(at_start, metrics)
        progress = train(
            stage,
            engine,
            batches=lambda step: self.corpus.stream(self.settings.data, training.batch_size, self.settings.seed, step, self.out),
            evaluate=lambda: evaluate(validation),
            preprocess=preprocess,
            checkpoints=Checkpoints(self.out),
            meters=meters,
            evaluate_first=evaluate_first,
            stop=stop,
        )
        seconds = meters.seconds
        metrics = evaluate(test)
        state = engine.state_dict()
        engine.close()
        result = self._result(progress, metrics, seconds)
        if dist.get_rank() == 0:
            if at_start.exists():
                result["metrics_at_0"] = json.loads(at_start.read_text())
            result.update(finish(self, stage, state))
            write_json_atomic(self.out / "result.json", result)
        meters.close()
        dist.barrier()
        Checkpoints(self.out).remove()
        return result

    def _result(self, progress: Progress, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
        return {
            **{key: value for key, value in self.identity.items() if key != "recipe"},
            "seed": self.settings.seed,
            "steps": progress.step,
            "stopped_early": progress.stopped_early,
            "flops": progress.flops,
            "teacher_flops": progress.teacher_flops,
            "kept_features": None if self.kept is None else self.kept.cost,
            "seconds": seconds,
            "metrics": metrics,
            "metrics_at_0": None,
            "curve": progress.curve,
        }


@torch.no_grad()
def evaluate_sizes(engine: Engine, stage: Stage, split: EvalSplit, preprocess: towers.Preprocess, corpus: Corpus) -> dict[str, float]:
    """Metrics of the stage's model on `split`; several sizes are averaged, and each is given under `.../iA-tB` too."""
    model: nn.Module = engine.model
    was_training = model.training
    model.eval()
    total: dict[str, float] = {}
    sizes = stage.evaluated_sizes()
    with engine.autocast():
        for size_name, size in sizes.items():
            metrics = evaluate_pairs(
                functools.partial(_encode, model, "image", size),
                functools.partial(_encode, model, "text", size),
                split,
                preprocess,
                engine.device,
                classes=corpus.classes,
                tokenize=corpus.tokenize,
            )
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + value / len(sizes)
                if size_name:
                    total[f"{name}/{size_name}"] = value
    model.train(was_training)
    return total


def _encode(model: nn.Module, tower: str, size: Mapping[str, int], inputs: Tensor) -> Tensor:
    return model(**{tower: inputs}, **size)[f"{tower}_features"]

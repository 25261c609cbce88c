"""The recipe: nested dataclasses of all that determines a run's numbers. `recipe_file` reads and writes them as YAML.

This module imports neither torch nor anything heavy, because the command line and the launchers read it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mmlg_scale.augmentation import Augmentation
from mmlg_scale.errors import UserError
from mmlg_scale.errors import require_key as _require
from mmlg_scale.metric_names import check_metric
from mmlg_scale.ranges import (
    BatchSize,
    Blocks,
    ClosedUnitInterval,
    Fraction,
    Knots,
    Layers,
    NonNegativeFloat,
    NonNegativeInt,
    Parts,
    PositiveFloat,
    PositiveInt,
    Rank,
    SceneCount,
    Steps,
    Students,
    UnitInterval,
    Width,
)
from mmlg_scale.sources import Source, check_captions, check_sources

Modality = Literal["both", "image", "text"]
Init = Literal["ancestor", "mmlg", "direct", "tleg", "sws", "scratch", "even", "distil"]
"""What `mmlg train` trains: the ancestor, or a size written or drawn in one of these ways."""
Method = Literal["mmlg", "tleg", "sws"]
"""What `mmlg extract` extracts."""
MODALITIES, INITS, METHODS = (typing.get_args(choices) for choices in (Modality, Init, Method))


LATER = {"later": True}
"""Metadata of a field that came later: at its default, which changes nothing, it is no part of a run's identity, so that runs from before
it are recognised."""


@contextlib.contextmanager
def in_section(key: str) -> Iterator[None]:
    """Around checks of an `Elastic` that name the recipe's keys as those of extraction: their errors name those below `key`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("recipe key extraction", f"recipe key {key}")) from error


@dataclass
class Scenes:
    """The procedural image-text set that ships with the project."""

    num_train: SceneCount = 20000
    """Training images."""
    num_val: SceneCount = 500
    """Validation images: learning curves and targets are measured here."""
    num_test: SceneCount = 1000
    """Test images: reported qualities are measured here."""
    seed: NonNegativeInt = 0
    """Seed of the data set; apart from the recipe's seed, so that runs of several seeds share one data set."""


@dataclass
class Data:
    """Image-text pairs."""

    path: str | None = None
    """A packed or indexed data set: a folder, or its URL (https://, s3://, gs://, hf://); null: the scenes below are generated."""
    sources: list[Source] | None = field(default=None, metadata=LATER)
    """In place of path, several data sets whose training samples are mixed by weight, one by one, in a fixed pattern. Validation and test
    splits are those of the first one, unless evaluate_on names another."""
    captions: dict[str, PositiveFloat] | None = field(default=None, metadata=LATER)
    """Which captions of a sample are trained on: names of keys of its JSON (txt: its text), each a caption or a list of them, with the
    weight by which one is drawn for each sample in every epoch: {alt: 0.5, synthetic: 0.5}. A name that a sample lacks is left out of its
    draw; one that has none of them gives its ordinary captions; both are counted. null: the ordinary captions, as in evaluation."""
    evaluate_on: str | None = field(default=None, metadata=LATER)
    """The data set whose validation and test splits are used; null: path, or the first of sources."""
    cache_dir: str | None = None
    """Copies of a remote set's shards: a folder on a disk of the node, for all its processes and runs."""
    cache_bytes: PositiveInt = 64 * 2**30
    """Of those copies together; those that have gone unused for longest are removed. At least 16 shards, better 32."""
    scenes: Scenes = field(default_factory=Scenes)
    """The procedural set, used when path is null."""
    augment: Literal["none", "crop", "resized_crop"] = "none"
    """Augmentation of training images: crop takes 80 to 100 % of the side of the centre square; resized_crop takes 90 to 100 % of the whole
    image's area (open_clip's, for photographs). Never a horizontal flip, since captions say left and right. Training reads JPEGs the quick
    way, up to two grey levels from what evaluation sees."""
    aug_cfg: Augmentation = field(default_factory=Augmentation, metadata=LATER)
    """What resized_crop draws, by the names of open_clip's aug_cfg."""
    tokenizer: Literal["auto", "model"] = "auto"
    """auto: a model trained from scratch takes the data set's tokenizer (open_clip's byte pairs where it has none), and a model that has a
    tokenizer must have the same one as the data set; model: the model's own (byte pairs from scratch), whatever the data set has."""
    check: Literal["auto", "decode", "structure"] = "auto"
    """What is looked at once before the first step, so that every epoch reads each intact sample exactly once: decode also decodes every
    image; structure reads only headers and captions, and replaces an image that does not decode by another sample; auto is decode up to
    200,000 training images, else structure, and always structure for a remote set."""
    max_bad_fraction: ClosedUnitInterval = 0.01
    """Fraction of damaged samples, which are skipped and listed, above which the run stops with the list; each source by itself."""

    @property
    def is_given(self) -> bool:
        """Whether data sets are named; else scenes are generated."""
        return self.path is not None or self.sources is not None

    def rules(self) -> list[dict[str, float] | None]:
        """The caption weights of each source, in their order."""
        return [self.captions] if self.sources is None else [source.captions for source in self.sources]

    def require_fit(self) -> None:
        """Raise UserError where fields do not go together."""
        check_captions(self.captions, "data.captions")
        if self.sources is not None:
            check_sources(self.sources, self.path, self.captions)
        _require(self.is_given or self.evaluate_on is None, "data.evaluate_on", "is given, data.path is null", "Give data.path too.")


@dataclass
class Model:
    """The ancestor's architecture."""

    architecture: str | None = None
    """Name of an open_clip configuration (ViT-B-32, ...); null: `config` below, or with weights in a model folder that folder's."""
    config: dict[str, Any] | None = None
    """An open_clip model configuration inline: embed_dim, vision_cfg, text_cfg. A vocab_size left out is taken from the tokenizer."""
    weights: str | None = None
    """The ancestor's weights: a file (open_clip, OpenAI or Hugging Face state dict; .safetensors or .pt) or a model folder. It is then not
    trained here."""
    loss: Literal["clip", "siglip"] = "clip"
    """Contrastive loss of every stage: CLIP's softmax over rows and columns, or SigLIP's sigmoid of each pair and a learned bias."""


@dataclass
class Optimizer:
    """AdamW or Muon with linear warm-up and cosine decay to zero."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for weight matrices and AdamW for all else, at the same learning rate and weight decay. ZeRO stages 0 to 2."""
    learning_rate: PositiveFloat = 1e-3
    """Peak rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only: never to vectors, coefficients, embeddings or the logit scale."""
    beta1: UnitInterval = 0.9
    """AdamW's first decay."""
    beta2: UnitInterval = 0.98
    """AdamW's second decay (CLIP's value)."""
    epsilon: PositiveFloat = 1e-6
    """AdamW's epsilon (CLIP's value)."""
    warmup_fraction: ClosedUnitInterval = 0.1
    """Fraction of the steps in which the rate rises linearly."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass
class Training:
    """One run of the training loop."""

    steps: Steps = 400
    """Optimiser steps; for adaptation 0 is allowed and means: use the model untrained."""
    batch_size: BatchSize = 128
    """Pairs per step over all ranks."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """Optimiser and schedule."""
    eval_every: PositiveInt = 50
    """Steps between evaluations on the validation split; a checkpoint is written after each."""
    accumulation: Parts = 1
    """Parts in which each rank computes its share of the batch: less memory, the same numbers, one more forward pass where above 1."""

    def check(self, key: str, *, allow_zero_steps: bool = False) -> None:
        """Raise UserError where fields do not go together; `key` is where this object is in the recipe."""
        _require(self.steps > 0 or allow_zero_steps, f"{key}.steps", "is 0", "Use a positive count.")
        parts = self.accumulation
        _require(
            self.batch_size % parts == 0, f"{key}.accumulation", f"{parts} does not divide batch_size {self.batch_size}", "Use a divisor."
        )


@dataclass
class DistillationLoss:
    """Weights of the terms that compare a student with the frozen ancestor."""

    contrastive: NonNegativeFloat = 1.0
    """Weight of the contrastive loss on the pairs themselves."""
    feature: NonNegativeFloat = 8.0
    """Weight of (1 - cosine) between student's and ancestor's features, each tower (TinyCLIP-like feature matching)."""
    affinity: NonNegativeFloat = 0.0
    """Weight of the cross entropy between the ancestor's and the student's similarities of the batch's images and texts (TinyCLIP)."""
    hidden: NonNegativeFloat = 1.0
    """Weight of the normalised mean squared error between hidden states at `hidden_depths`, each tower."""
    hidden_depths: list[Fraction] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """Relative depths at which hidden states are compared."""


@dataclass
class Elastic:
    """Training a learngene: an auxiliary CLIP whose layers are weighted sums of the blocks, at a random depth each step."""

    num_multimodal: Blocks = 1
    """Blocks shared by both towers (K_M)."""
    num_unimodal: Blocks = 1
    """Blocks of one tower only, per tower (K_U)."""
    basis: Literal["knots", "linear", "step"] = "knots"
    """How coefficients depend on depth: learned at knots; fixed {1, t} (TLEG, two blocks); fixed stages (SWS, one block each)."""
    convention: Literal["inclusive", "paper"] = "inclusive"
    """Relative depth in the linear basis: l / (L - 1), or TLEG's l / L."""
    num_knots: Knots = 8
    """Knots over relative depth between which coefficients and vectors are interpolated (R)."""
    width_map: Literal["slice", "learned"] = "slice"
    """How the multimodal blocks, as wide as the wider tower, reach the other: leading heads and channels, or learned maps."""
    embedding_rank: Rank | None = field(default=None, metadata=LATER)
    """Rank of the token embedding, stored as two factors and multiplied out in descendants; null: stored whole."""
    file_dtype: Literal["fp32", "bf16"] = field(default="fp32", metadata=LATER)
    """Numbers in the learngene file; training is the same. bf16 halves the file: blocks and matrices are rounded, all else stays fp32."""
    width_shares: list[Fraction] = field(default_factory=lambda: [1.0])
    """Fractions of a tower's heads, one drawn for each tower every step; [1, 1, 0.5] takes half the width every third time."""
    min_layers: Layers = 2
    """Smallest depth drawn."""
    max_layers: Layers | None = None
    """Largest depth drawn; null: the architecture's."""
    students_per_step: Students = 1
    """Sizes drawn every step; their losses are averaged. In extraction they share one forward pass of the ancestor."""
    training: Training = field(default_factory=Training)
    """The loop's settings; its learning rate is that of the blocks."""
    coefficient_rate: NonNegativeFloat = 3.0
    """Learning rate of the coefficients, as a multiple of the blocks'."""
    stem_rate: NonNegativeFloat = 0.5
    """Learning rate of the stems, as a multiple of the blocks'."""

    def check(self, key: str) -> None:
        """Raise UserError where fields do not go together; `key` is where this object is in the recipe."""
        self.training.check(f"{key}.training")
        _require(self.num_multimodal + self.num_unimodal > 0, key, "has no blocks", "Set num_unimodal to 1.")
        most = self.max_layers
        _require(most is None or most >= self.min_layers, f"{key}.max_layers", f"is {most}, below min_layers", "Use that or more.")
        _require(bool(self.width_shares), f"{key}.width_shares", "is empty", "Use [1.0].")


@dataclass
class Extraction(Elastic):
    """Distilling the learngene out of the ancestor."""

    start: Literal["fitted", "random"] = "fitted"
    """Blocks before training: fitted to the ancestor's layers, which are aligned first, by least squares; or random."""
    loss: DistillationLoss = field(default_factory=DistillationLoss)
    """What is compared with the ancestor."""


@dataclass
class Pretraining(Elastic):
    """Training a learngene on the pairs themselves by the contrastive loss: no ancestor."""

    coefficient_rate: NonNegativeFloat = 1.0
    """Learning rate of the coefficients, as a multiple of the blocks'."""
    stem_rate: NonNegativeFloat = 0.3
    """Learning rate of the stems, as a multiple of the blocks'."""


@dataclass
class Size:
    """One descendant."""

    image_layers: Layers = 4
    """Depth of the image tower."""
    text_layers: Layers = 4
    """Depth of the text tower."""
    image_width: Width | None = None
    """Residual width of the image tower, a multiple of its head dimension; null: the ancestor's."""
    text_width: Width | None = None
    """Residual width of the text tower, likewise."""
    modality: Modality = "both"
    """Both towers, or only one."""
    in_sum: bool = True
    """Whether the size counts in the cost ratio (and so gets its baselines); single towers never do."""

    @property
    def name(self) -> str:
        """`i4-t4` for both towers, `i4` or `t4` for one, `i4w48-t4w48` where narrower: names folders and table rows."""
        image = f"i{self.image_layers}" + (f"w{self.image_width}" if self.image_width else "")
        text = f"t{self.text_layers}" + (f"w{self.text_width}" if self.text_width else "")
        return {"both": f"{image}-{text}", "image": image}.get(self.modality, text)

    def sizes(self) -> dict[str, int | None]:
        """The sizes of the towers that the descendant has, as keyword arguments."""
        towers = ("image", "text") if self.modality == "both" else (self.modality,)
        return {f"{tower}_{kind}": getattr(self, f"{tower}_{kind}") for tower in towers for kind in ("layers", "width")}


@dataclass
class Adaptation:
    """Short training of a descendant after it is written."""

    training: Training = field(default_factory=lambda: Training(steps=0))
    """The loop's settings."""
    loss: DistillationLoss = field(default_factory=lambda: DistillationLoss(feature=4.0, hidden=0.0))
    """Terms kept from the ancestor."""


@dataclass
class Baselines:
    """What the learngene is compared with, at every size in the sum; null leaves one out."""

    scratch: Training | None = field(default_factory=Training)
    """Training each size from random weights. Its final quality is the target of all others."""
    even: Training | None = field(default_factory=Training)
    """Uniform layer selection: every n-th layer of the ancestor, then training."""
    even_loss: DistillationLoss | None = None
    """Terms that compare uniform layer selection with the ancestor while it trains; null: the contrastive loss only."""
    distil: Training | None = field(default_factory=Training)
    """Training each size from random weights with the ancestor as teacher."""
    distil_loss: DistillationLoss = field(default_factory=DistillationLoss)
    """Terms of the separate distillation."""
    tleg: Extraction | None = None
    """A learngene of the linear basis (TLEG), extracted and adapted beside ours; null: not run."""
    sws: Extraction | None = None
    """A learngene of the step basis (stage-wise weight sharing), likewise."""

    def learngenes(self) -> dict[str, Extraction]:
        """The learngenes of other methods that are asked for."""
        return {name: found for name in ("tleg", "sws") if (found := getattr(self, name)) is not None}


@dataclass
class Evaluation:
    """What quality means in curves, targets and cost ratios."""

    metric: str = "mean_recall@1"
    """Metric compared: mean_recall@1 (mean of both retrieval directions; also @5, @10), or for sets with classes acc1 (zero-shot)."""


@dataclass
class Engine:
    """In which precision models compute, and whether the ancestor computes every step."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 parameters and computes by autocast."""
    communication: Literal["fp32", "bf16"] = field(default="fp32", metadata=LATER)
    """In what ranks exchange gradients. bf16 halves what is sent and rounds it, so that results depend on the number of ranks; at ZeRO
    stage 3 with precision bf16 it is also what matrices are gathered in."""
    keep_features: bool = False
    """Compute the ancestor's features of every training image and caption once (`mmlg features`), and read them in every run instead of
    running the ancestor: for data.augment none and losses without hidden states."""


@dataclass
class Family:
    """The members and when their training ends."""

    sizes: list[Size] = field(default_factory=lambda: [Size(n, n) for n in (2, 3, 4, 6, 8)])
    """The descendants."""
    stop_at_target: bool = True
    """Stop adaptation, even and distil once they are at scratch's final quality: untrained, or in two consecutive evaluations."""


@dataclass
class Recipe:
    """Everything that determines a run, apart from where it is written."""

    seed: NonNegativeInt = 0
    """Seed of every random choice but the data set's."""
    data: Data = field(default_factory=Data)
    """Image-text pairs."""
    model: Model = field(default_factory=Model)
    """The ancestor's architecture."""
    ancestor: Training = field(default_factory=Training)
    """Training of the ancestor."""
    extraction: Extraction = field(default_factory=Extraction)
    """Distilling the learngene."""
    pretraining: Pretraining | None = None
    """A learngene trained directly on the pairs (mmlg pretrain), without the ancestor; its untrained descendants are listed as direct.
    Null leaves it out."""
    adaptation: Adaptation = field(default_factory=Adaptation)
    """Training of descendants after they are written."""
    baselines: Baselines = field(default_factory=Baselines)
    """What the learngene is compared with."""
    family: Family = field(default_factory=Family)
    """The members."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """What quality means."""
    engine: Engine = field(default_factory=Engine)
    """Precision, and the ancestor's features."""

    def check(self) -> None:
        """Raise UserError naming the key when a value is out of range. Called once after parsing."""
        _require(
            self.model.architecture is None or self.model.config is None,
            "model",
            "has architecture and config",
            "Name an open_clip configuration, or give one inline.",
        )
        self.data.require_fit()
        data = self.data
        data.aug_cfg.check("data.aug_cfg")
        used = data.augment == "resized_crop" or data.aug_cfg == Augmentation()
        problem = f"is given, and data.augment {data.augment} does not draw it"
        _require(used, "data.aug_cfg", problem, "Set data.augment to resized_crop, or leave aug_cfg out.")
        self.ancestor.check("ancestor")
        self.extraction.check("extraction")
        if self.pretraining is not None:
            self.pretraining.check("pretraining")
        for name, extraction in self.baselines.learngenes().items():
            extraction.check(f"baselines.{name}")
        self.adaptation.training.check("adaptation.training", allow_zero_steps=True)
        for name in ("scratch", "even", "distil"):
            training: Training | None = getattr(self.baselines, name)
            if training is not None:
                training.check(f"baselines.{name}")
        check_metric(self.evaluation.metric, has_classes=True)
        if self.engine.keep_features:
            self._check_kept_features()
        names = [size.name for size in self.family.sizes]
        _require(len(set(names)) == len(names), "family.sizes", "has the same size twice", "Remove the repeated one.")

    def _check_kept_features(self) -> None:
        key, augment = "engine.keep_features", self.data.augment
        _require(augment == "none", key, f"keeps features of whole images, data.augment is {augment}", "Use none, or keep no features.")
        losses = {"extraction.loss": self.extraction.loss}
        losses |= {f"baselines.{name}.loss": found.loss for name, found in self.baselines.learngenes().items()}
        losses |= {"adaptation.loss": self.adaptation.loss} if self.adaptation.training.steps else {}
        losses |= {"baselines.distil_loss": self.baselines.distil_loss} if self.baselines.distil is not None else {}
        if self.baselines.even is not None and self.baselines.even_loss is not None:
            losses["baselines.even_loss"] = self.baselines.even_loss
        for name, loss in losses.items():
            problem = f"keeps final features, {name}.hidden is {loss.hidden} and compares hidden states"
            _require(loss.hidden == 0, key, problem, f"Set {name}.hidden to 0, or keep no features.")

    def learngenes(self) -> dict[str, Elastic]:
        """The settings of every learngene that is asked for, by the dotted key of their section, ours first."""
        found: dict[str, Elastic] = {"extraction": self.extraction}
        if self.pretraining is not None:
            found["pretraining"] = self.pretraining
        return found | {f"baselines.{name}": extraction for name, extraction in self.baselines.learngenes().items()}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain nested dictionaries."""
        return dataclasses.asdict(self)

    def used_by(self, role: str, *, init: str | None = None, has_target: bool = False) -> dict[str, Any]:
        """The keys that the numbers of a run depend on, as nested dictionaries; what a run reads is compared by digest instead.

        Args:
            role: ancestor, features, extraction, pretraining or descendant.
            init: the extraction's method or the descendant's initialisation.
            has_target: whether the run may stop at another run's quality.
        """
        whole = _identity(self)
        if role == "features":
            # Of all captions that may be read, however often.
            names = [sorted(captions) if captions is not None else None for captions in self.data.rules()]
            return {"engine": {"precision": self.engine.precision}} | ({"data": {"captions": names}} if any(names) else {})
        found = {key: whole[key] for key in ("seed", "engine", "model")}
        found["data"] = {key: given for key, given in whole["data"].items() if key in ("augment", "aug_cfg", "check")}
        found["data"] |= {"captions": self.data.captions} if self.data.captions is not None else {}
        if self.data.sources is not None:
            # Which sets they are goes by digest.
            found["data"]["sources"] = [{"weight": source.weight, "captions": source.captions} for source in self.data.sources]
        if role == "ancestor":
            # Weights that are read are compared by digest; they are not trained.
            found |= {"ancestor": whole["ancestor"]} if self.model.weights is None else {}
            del found["engine"]["keep_features"]
            del found["model"]["weights"]
            return found
        found["model"] = {key: whole["model"][key] for key in ("architecture", "config", "loss")}
        if role == "pretraining":
            del found["engine"]["keep_features"]
            return found | {"pretraining": whole["pretraining"]}
        if init == "direct":
            return found
        if init in METHODS:
            section = ("extraction" if init == "mmlg" else f"baselines.{init}") if role == "extraction" else "adaptation"
        else:
            section = f"baselines.{init}"
        for key in (section, *([f"baselines.{init}_loss"] if init in ("even", "distil") else [])):
            outer, _, inner = key.partition(".")
            found.setdefault(outer, {}).update({inner: whole[outer][inner]} if inner else whole[outer])
        if has_target:
            found["family"] = {"stop_at_target": self.family.stop_at_target}
            found["evaluation"] = whole["evaluation"]
        return found


def _identity(value: Any) -> Any:
    """A part of the recipe as nested dictionaries, without LATER fields at their defaults."""
    if isinstance(value, list):
        return [_identity(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {item: getattr(value, item.name) for item in dataclasses.fields(value)}
    return {item.name: _identity(given) for item, given in found.items() if not (item.metadata.get("later") and given == _default(item))}


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()

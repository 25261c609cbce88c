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
    Steps,
    Students,
    UnitInterval,
    Width,
)
from mmlg_scale.recipe_data import Data
from mmlg_scale.recipe_identity import LATER, identity_of

Modality = Literal["both", "image", "text"]
Init = Literal["ancestor", "mmlg", "direct", "tleg", "sws", "scratch", "even", "distil"]
"""What `mmlg train` trains: the ancestor, or a size written or drawn in one of these ways."""
Method = Literal["mmlg", "tleg", "sws"]
"""What `mmlg extract` extracts."""
MODALITIES, INITS, METHODS = (typing.get_args(choices) for choices in (Modality, Init, Method))


@contextlib.contextmanager
def in_section(key: str) -> Iterator[None]:
    """Around checks of an `Elastic` that name the recipe's keys as those of extraction: their errors name those below `key`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("recipe key extraction", f"recipe key {key}")) from error


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
    """Pairs per step over all ranks; with data.captions_per_image, images."""
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
    teacher_pool: PositiveInt | None = field(default=None, metadata=LATER)
    """Pairs that training walks through again and again, in a new order each time: the first so many of its order, each with one caption
    and one augmentation. The ancestor runs once on each, and its outputs are kept on disk while the run is under way. A multiple of the
    batch size; null: ever new pairs."""
    teacher_pool_dtype: Literal["bf16", "fp32"] = field(default="bf16", metadata=LATER)
    """In what type the ancestor's outputs for the pool are kept and compared; bf16 takes half the space."""


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
    sampling: Literal["random", "sandwich"] = field(default="random", metadata=LATER)
    """sandwich: of a step's sizes the first is the greatest, the second the smallest, all others are random (Yu & Huang 2019)."""
    growth: ClosedUnitInterval = field(default=0.0, metadata=LATER)
    """Fraction of the steps over which the greatest depth drawn grows from min_layers to max_layers, so that early steps cost less (after
    progressive stacking, Gong et al. 2019); 0: all depths from the start."""
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
        problem = f"is sandwich, which takes two sizes a step, and students_per_step is {self.students_per_step}"
        _require(self.sampling == "random" or self.students_per_step > 1, f"{key}.sampling", problem, "Set students_per_step to 2 or more.")


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
    in_place: NonNegativeFloat = field(default=0.0, metadata=LATER)
    """In-place distillation (Yu & Huang 2019): weight of (1 - cosine) between the features of a step's other sizes and those of its
    greatest, which is not changed by it. Needs sampling: sandwich."""

    def check(self, key: str) -> None:
        super().check(key)
        problem = f"compares with the greatest size of a step, and sampling is {self.sampling}"
        _require(not self.in_place or self.sampling == "sandwich", f"{key}.in_place", problem, "Set sampling to sandwich, or this to 0.")


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
    reuse_teacher_pool: bool = field(default=False, metadata=LATER)
    """Compare with the ancestor's outputs that the extraction kept for its own teacher_pool, so that the ancestor does not run again. They
    stay beside the learngene. loss.teacher_pool pairs of them are walked through."""
    direct: Training | None = field(default=None, metadata=LATER)
    """Training of what is written from a learngene that was pre-trained directly: by the contrastive loss alone, as there is no ancestor.
    Null: used untrained."""


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
    """A learngene trained directly on the pairs (mmlg pretrain), without the ancestor; its descendants are listed as direct. Null leaves it
    out."""
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
            basis = {"tleg": "linear", "sws": "step"}[name]
            problem = f"is {extraction.basis}, which is not what {name.upper()} does"
            _require(extraction.basis == basis, f"baselines.{name}.basis", problem, f"Set it to {basis}.")
        self.adaptation.training.check("adaptation.training", allow_zero_steps=True)
        if self.adaptation.direct is not None:
            self.adaptation.direct.check("adaptation.direct")
        for name in ("scratch", "even", "distil"):
            training: Training | None = getattr(self.baselines, name)
            if training is not None:
                training.check(f"baselines.{name}")
        check_metric(self.evaluation.metric, has_classes=True)
        if self.engine.keep_features:
            self._check_kept_features()
        self._check_pools()
        if self.reuses_teacher_pool:
            self._check_reuse()
        names = [size.name for size in self.family.sizes]
        _require(len(set(names)) == len(names), "family.sizes", "has the same size twice", "Remove the repeated one.")

    def _check_kept_features(self) -> None:
        key, augment = "engine.keep_features", self.data.augment
        _require(augment == "none", key, f"keeps features of whole images, data.augment is {augment}", "Use none, or keep no features.")
        for name, (loss, _) in self.comparisons().items():
            problem = f"keeps final features, {name}.hidden is {loss.hidden} and compares hidden states"
            _require(loss.hidden == 0, key, problem, f"Set {name}.hidden to 0, or keep no features.")

    def comparisons(self) -> dict[str, tuple[DistillationLoss, Training]]:
        """The terms of every training that compares with the ancestor, by their dotted key, and that training."""
        extractions = {"extraction": self.extraction} | {f"baselines.{name}": own for name, own in self.baselines.learngenes().items()}
        found = {f"{name}.loss": (own.loss, own.training) for name, own in extractions.items()}
        baselines = self.baselines
        if self.adaptation.training.steps:
            found["adaptation.loss"] = self.adaptation.loss, self.adaptation.training
        if baselines.distil is not None:
            found["baselines.distil_loss"] = baselines.distil_loss, baselines.distil
        if baselines.even is not None and baselines.even_loss is not None:
            found["baselines.even_loss"] = baselines.even_loss, baselines.even
        return found

    def _check_pools(self) -> None:
        for name, (loss, training) in self.comparisons().items():
            key, pool, size = f"{name}.teacher_pool", loss.teacher_pool, training.batch_size
            if pool is not None:
                _require(pool % size == 0, key, f"{pool} is not a multiple of batch_size {size}", f"Use {-(-pool // size) * size}.")
                _require(not self.engine.keep_features, key, "is given beside engine.keep_features", "Keep one of the two.")
                problem = f"keeps one caption of each sample, data.captions_per_image is {self.data.captions_per_image}"
                _require(self.data.captions_per_image == 1, key, problem, "Use no pool, or one caption.")

    @property
    def reuses_teacher_pool(self) -> bool:
        """Whether extractions keep the ancestor's outputs for the adaptation of what is written from them."""
        return self.adaptation.reuse_teacher_pool and self.adaptation.training.steps > 0

    def keeps_teacher_pool(self, loss_key: str) -> bool:
        """Whether the training at a key of `comparisons` leaves the ancestor's outputs beside what it trains, a learngene."""
        return self.reuses_teacher_pool and loss_key.removesuffix(".loss") in self.learngenes()

    def _check_reuse(self) -> None:
        loss, key = self.adaptation.loss, "adaptation.loss"
        wanted = loss.teacher_pool
        _require(
            wanted is not None, f"{key}.teacher_pool", "is null beside adaptation.reuse_teacher_pool", "Say how many pairs to walk through."
        )
        for name, (other, training) in self.comparisons().items():
            if not self.keeps_teacher_pool(name):
                continue
            kept = min(other.teacher_pool or 0, training.steps * training.batch_size)
            problem = f"{wanted} pairs are to be reused, {name} keeps the outputs of {kept}"
            _require(wanted is None or wanted <= kept, f"{key}.teacher_pool", problem, f"Use fewer, or a larger {name}.teacher_pool.")
            same = loss.teacher_pool_dtype == other.teacher_pool_dtype
            _require(same, f"{key}.teacher_pool_dtype", f"is not {name}'s {other.teacher_pool_dtype}", "Use the same.")
            same = not loss.hidden or (bool(other.hidden) and loss.hidden_depths == other.hidden_depths)
            depths = other.hidden_depths if other.hidden else []
            _require(
                same, f"{key}.hidden_depths", f"are to be reused, {name} keeps hidden states at {depths}", "Use the same, or hidden: 0."
            )

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
        whole = identity_of(self)
        if role == "features":
            # Of all captions that may be read, however often.
            names = [sorted(captions) if captions is not None else None for captions in self.data.rules()]
            return {"engine": {"precision": self.engine.precision}} | ({"data": {"captions": names}} if any(names) else {})
        found = {key: whole[key] for key in ("seed", "engine", "model")}
        found["data"] = {key: given for key, given in whole["data"].items() if key in ("augment", "aug_cfg", "check", "captions_per_image")}
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
        direct = whole["adaptation"].pop("direct", None)  # depended on by descendants of direct pre-training, and by them only
        if init == "direct":
            sections = []
            found |= {"adaptation": {"direct": direct}} if direct is not None else {}
        elif init in METHODS:
            sections = [("extraction" if init == "mmlg" else f"baselines.{init}") if role == "extraction" else "adaptation"]
        else:
            sections = [f"baselines.{init}", *([f"baselines.{init}_loss"] if init in ("even", "distil") else [])]
        for key in sections:
            outer, _, inner = key.partition(".")
            found.setdefault(outer, {}).update({inner: whole[outer][inner]} if inner else whole[outer])
        if has_target:
            found["family"] = {"stop_at_target": self.family.stop_at_target}
            found["evaluation"] = whole["evaluation"]
        return found

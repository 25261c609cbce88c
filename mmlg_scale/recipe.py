"""The recipe: nested dataclasses of all that determines a run's numbers. `recipe_file` reads and writes them as YAML.

This module imports neither torch nor anything heavy, because the command line and the launchers read it.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from mmlg_scale.augmentation import Augmentation
from mmlg_scale.errors import require_key as _require
from mmlg_scale.metric_names import check_metric
from mmlg_scale.ranges import Layers, NonNegativeInt, Width
from mmlg_scale.recipe_data import Data
from mmlg_scale.recipe_identity import LATER, identity_of
from mmlg_scale.recipe_training import (
    Continuation,
    DistillationLoss,
    Elastic,
    Extraction,
    Optimizer,
    Pretraining,
    Training,
    in_section,
)

__all__ = [
    "INITS",
    "METHODS",
    "MODALITIES",
    "Adaptation",
    "Baselines",
    "Continuation",
    "Data",
    "DistillationLoss",
    "Elastic",
    "Engine",
    "Evaluation",
    "Extraction",
    "Family",
    "Init",
    "Method",
    "Modality",
    "Model",
    "Optimizer",
    "Pretraining",
    "Recipe",
    "Size",
    "Training",
    "in_section",
    "section_of",
]

Modality = Literal["both", "image", "text"]
Init = Literal["ancestor", "mmlg", "direct", "tleg", "sws", "scratch", "even", "distil"]
"""What `mmlg train` trains: the ancestor, or a size written or drawn in one of these ways."""
Method = Literal["mmlg", "tleg", "sws"]
"""What `mmlg extract` extracts."""
MODALITIES, INITS, METHODS = (typing.get_args(choices) for choices in (Modality, Init, Method))


def section_of(method: str) -> str:
    """The dotted key of the settings with which a method extracts its learngene."""
    return "extraction" if method == "mmlg" else f"baselines.{method}"


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
        """The learngenes of other methods that are asked for, by method."""
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
        found = {f"{section_of(method)}.loss": (own.loss, own.training) for method, own in self.extractions().items()}
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
        continued = ", ".join(f"{section_of(method)}.continuation" for method in self.continuations())
        problem = f"is true beside {continued}, and nothing is kept beside a learngene that is trained further"
        _require(not continued, "adaptation.reuse_teacher_pool", problem, "Set it to false, or leave the continuation out.")
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

    def extractions(self) -> dict[str, Extraction]:
        """The settings of every learngene that is extracted, by method, ours first."""
        return {"mmlg": self.extraction, **self.baselines.learngenes()}

    def continuations(self) -> dict[str, Pretraining]:
        """The settings with which extracted learngenes are trained further on the pairs, by method."""
        return {method: found for method, own in self.extractions().items() if (found := own.continued()) is not None}

    def learngenes(self) -> dict[str, Elastic]:
        """The settings of every learngene that is asked for, by the dotted key of their section, ours first."""
        found: dict[str, Elastic] = {section_of(method): own for method, own in self.extractions().items()}
        return found | ({"pretraining": self.pretraining} if self.pretraining is not None else {})

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
        elif init is not None and init in METHODS:
            sections = [section_of(init) if role == "extraction" else "adaptation"]
        else:
            sections = [f"baselines.{init}", *([f"baselines.{init}_loss"] if init in ("even", "distil") else [])]
        for key in sections:
            outer, _, inner = key.partition(".")
            found.setdefault(outer, {}).update({inner: whole[outer][inner]} if inner else whole[outer])
            if role == "extraction":
                (found[outer][inner] if inner else found[outer]).pop("continuation", None)  # a run of its own
        if has_target:
            found["family"] = {"stop_at_target": self.family.stop_at_target}
            found["evaluation"] = whole["evaluation"]
        return found

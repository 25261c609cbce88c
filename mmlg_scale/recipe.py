"""The recipe: nested dataclasses that are the whole configuration of a run.

A recipe is a YAML file with these fields; every field can be overridden on the command line by its dotted name
(``--extraction.training.steps 200``), and ``--print-config`` prints the resolved whole. jsonargparse does the parsing: it is the one
library that gives nested dataclasses, YAML files, dotted overrides, help from docstrings and printing back, together.

This module imports neither torch nor anything heavy, because ``mmlg --help`` and the launchers read it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmlg_scale.errors import UserError

SHIPPED = Path(__file__).with_name("recipes")
Modality = Literal["both", "image", "text"]


def _require(condition: bool, key: str, problem: str, remedy: str) -> None:
    if not condition:
        raise UserError(f"recipe key {key}: {problem}. {remedy}")


@dataclass
class Scenes:
    """The procedural image-text set that ships with the project."""

    num_train: int = 20000
    """Training images."""
    num_val: int = 500
    """Validation images: learning curves and targets are measured here."""
    num_test: int = 1000
    """Test images: reported qualities are measured here."""
    seed: int = 0
    """Seed of the data set; apart from the recipe's seed, so that runs of several seeds share one data set."""


@dataclass
class Data:
    """Image-text pairs."""

    path: str | None = None
    """A packed data set (a folder written by `mmlg data scenes` or `mmlg data pack`); null: the scenes below are generated."""
    scenes: Scenes = field(default_factory=Scenes)
    """The procedural set, used when path is null."""
    augment: Literal["none", "crop", "resized_crop"] = "none"
    """Augmentation of training images: crop takes 80 to 100 % of the side of the centre square; resized_crop takes 90 to 100 % of the whole
    image's area (open_clip's, for photographs). Never a horizontal flip, since captions say left and right."""
    num_workers: int = 0
    """Loader processes per rank; 0 decodes in the training process (small images are cached after their first use)."""
    check: Literal["decode", "structure"] = "decode"
    """What is looked at once before the first step, so that every epoch reads each intact sample exactly once: decode also decodes every
    image; structure reads headers and captions alone, and replaces an image that does not decode by another sample."""
    max_bad_fraction: float = 0.01
    """Share of damaged samples, which are skipped and listed, above which the run stops with the list."""


@dataclass
class Model:
    """The ancestor's architecture."""

    architecture: str | None = None
    """Name of an open_clip configuration (ViT-B-32, ...); null: `config` below."""
    config: dict[str, Any] | None = None
    """An open_clip model configuration inline: embed_dim, vision_cfg, text_cfg. A vocab_size left out is taken from the tokenizer."""
    weights: str | None = None
    """A file of the ancestor's weights (open_clip, OpenAI or Hugging Face state dict; .safetensors or .pt): it is then not trained here."""
    loss: Literal["clip", "siglip"] = "clip"
    """Contrastive loss of every stage: CLIP's softmax over rows and columns, or SigLIP's sigmoid of each pair and a learned bias."""


@dataclass
class Optimizer:
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: float = 1e-3
    """Peak rate."""
    weight_decay: float = 0.1
    """Applied to matrices only: never to vectors, coefficients, embeddings or the logit scale."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.98
    """AdamW's second decay (CLIP's value)."""
    epsilon: float = 1e-6
    """AdamW's epsilon (CLIP's value)."""
    warmup_fraction: float = 0.1
    """Share of the steps in which the rate rises linearly."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""


@dataclass
class Training:
    """One run of the training loop."""

    steps: int = 400
    """Optimiser steps; for adaptation 0 is allowed and means: use the model as written."""
    batch_size: int = 128
    """Pairs per step over all ranks."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """Optimiser and schedule."""
    eval_every: int = 50
    """Steps between evaluations on the validation split; a checkpoint is written after each."""
    accumulation: int = 1
    """Parts in which each rank computes its share of the batch: less memory, the same numbers, one more forward pass where above 1."""

    def check(self, key: str, *, allow_zero_steps: bool = False) -> None:
        """Raise UserError when a field is out of its range; `key` is where this object sits in the recipe."""
        _require(self.steps >= (0 if allow_zero_steps else 1), f"{key}.steps", f"is {self.steps}", "Use a positive count.")
        _require(self.batch_size >= 2, f"{key}.batch_size", f"is {self.batch_size}", "A contrastive loss needs 2 or more.")
        _require(self.eval_every >= 1, f"{key}.eval_every", f"is {self.eval_every}", "Use 1 or more.")
        parts = self.accumulation
        _require(parts >= 1, f"{key}.accumulation", f"is {parts}", "Use 1 or more.")
        _require(
            self.batch_size % parts == 0, f"{key}.accumulation", f"{parts} does not divide batch_size {self.batch_size}", "Use a divisor."
        )
        rate = self.optimizer.learning_rate
        _require(rate > 0, f"{key}.optimizer.learning_rate", f"is {rate}", "Use a positive rate.")


@dataclass
class DistillationLoss:
    """Weights of the terms that compare a student with the frozen ancestor."""

    contrastive: float = 1.0
    """Weight of the contrastive loss on the pairs themselves."""
    feature: float = 8.0
    """Weight of (1 - cosine) between student's and ancestor's features, each tower (TinyCLIP-like feature matching)."""
    affinity: float = 0.0
    """Weight of the cross entropy between the ancestor's and the student's similarities of the batch's images and texts (TinyCLIP)."""
    hidden: float = 1.0
    """Weight of the normalised mean squared error between hidden states at `hidden_depths`, each tower."""
    hidden_depths: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """Relative depths at which hidden states are compared."""


@dataclass
class Extraction:
    """Distilling the learngene: an auxiliary CLIP whose layers are weighted sums of the blocks, at a random depth each step."""

    num_multimodal: int = 1
    """Blocks shared by both towers (K_M)."""
    num_unimodal: int = 1
    """Blocks of each tower alone (K_U)."""
    basis: Literal["knots", "linear", "step"] = "knots"
    """How coefficients depend on depth: learned at knots; fixed {1, t} (TLEG, two blocks); fixed stages (SWS, one block each)."""
    convention: Literal["inclusive", "paper"] = "inclusive"
    """Relative depth in the linear basis: l / (L - 1), or TLEG's l / L."""
    num_knots: int = 8
    """Knots over relative depth between which coefficients and vectors are interpolated (R)."""
    width_map: Literal["slice", "learned"] = "slice"
    """How the multimodal blocks, as wide as the wider tower, reach the other: leading heads and channels, or learned maps."""
    width_shares: list[float] = field(default_factory=lambda: [1.0])
    """Shares of a tower's heads, one drawn for each tower every step; [1, 1, 0.5] takes half the width every third time."""
    min_layers: int = 2
    """Smallest depth drawn."""
    max_layers: int | None = None
    """Largest depth drawn; null: the ancestor's."""
    students_per_step: int = 1
    """Sizes drawn every step, which share the ancestor's one forward pass; their losses are averaged."""
    training: Training = field(default_factory=Training)
    """The loop's settings; its learning rate is that of the blocks."""
    coefficient_rate: float = 3.0
    """Learning rate of the coefficients, as a multiple of the blocks'."""
    stem_rate: float = 0.5
    """Learning rate of the stems, as a multiple of the blocks'."""
    compose_per_layer: bool = False
    """Sum a layer's matrices when it runs, not all before the first; with engine.activation_checkpointing one layer's are in memory."""
    loss: DistillationLoss = field(default_factory=DistillationLoss)
    """What is compared with the ancestor."""

    def check(self, key: str) -> None:
        """Raise UserError when a field is out of its range; `key` is where this object sits in the recipe."""
        self.training.check(f"{key}.training")
        for name in ("num_multimodal", "num_unimodal"):
            _require(getattr(self, name) >= 0, f"{key}.{name}", "is negative", "Use 0 or more.")
        _require(self.num_multimodal + self.num_unimodal > 0, key, "has no blocks", "Set num_unimodal to 1.")
        _require(self.num_knots >= 2, f"{key}.num_knots", f"is {self.num_knots}", "Use 2 or more.")
        _require(self.students_per_step >= 1, f"{key}.students_per_step", f"is {self.students_per_step}", "Use 1 or more.")
        _require(self.min_layers >= 1, f"{key}.min_layers", f"is {self.min_layers}", "Use 1 or more.")
        most = self.max_layers
        _require(most is None or most >= self.min_layers, f"{key}.max_layers", f"is {most}, below min_layers", "Use that or more.")
        shares = self.width_shares
        _require(bool(shares) and all(0 < share <= 1 for share in shares), f"{key}.width_shares", f"is {shares}", "Use shares in (0, 1].")


@dataclass
class Size:
    """One descendant."""

    image_layers: int = 4
    """Depth of the image tower."""
    text_layers: int = 4
    """Depth of the text tower."""
    image_width: int | None = None
    """Residual width of the image tower, a multiple of its head dimension; null: the ancestor's."""
    text_width: int | None = None
    """Residual width of the text tower, likewise."""
    modality: Modality = "both"
    """Both towers, or one alone."""
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
    """Every n-th layer of the ancestor, then training."""
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
    """Metric compared: mean_recall@1 (mean of both retrieval directions), or acc1 (zero-shot) for sets with classes."""


@dataclass
class Engine:
    """How the model is spread and in which precision it computes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 parameters and computes by autocast."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each transformer block and recompute it in the backward pass: less memory, a third more compute."""
    shard_ancestor: bool = False
    """Each rank keeps its share of the frozen ancestor and gathers a block when it runs: less memory, more communication, same numbers."""
    keep_features: bool = False
    """Compute the ancestor's features of every training image and caption once (`mmlg features`), and read them in every run instead of
    running the ancestor: for data.augment none and losses without hidden states."""
    num_processes: int = 1
    """Ranks of each training step of `mmlg family`."""
    threads: int | None = 1
    """CPU threads per rank; null: the cores divided by the ranks. Results depend on it in the last digits, so it is part of the recipe."""


@dataclass
class Family:
    """The members and how their training is run."""

    sizes: list[Size] = field(default_factory=lambda: [Size(n, n) for n in (2, 3, 4, 6, 8)])
    """The descendants."""
    stop_at_target: bool = True
    """Stop adaptation, even and distil once they are at scratch's final quality in two consecutive evaluations."""
    parallel: int | None = None
    """Training steps run side by side; null: as many as the cores allow, or one on a GPU."""


@dataclass
class Recipe:
    """Everything that determines a run, apart from where it is written."""

    seed: int = 0
    """Seed of every random choice but the data set's."""
    data: Data = field(default_factory=Data)
    """Image-text pairs."""
    model: Model = field(default_factory=Model)
    """The ancestor's architecture."""
    ancestor: Training = field(default_factory=Training)
    """Training of the ancestor."""
    extraction: Extraction = field(default_factory=Extraction)
    """Distilling the learngene."""
    adaptation: Adaptation = field(default_factory=Adaptation)
    """Training of descendants after they are written."""
    baselines: Baselines = field(default_factory=Baselines)
    """What the learngene is compared with."""
    family: Family = field(default_factory=Family)
    """The members."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """What quality means."""
    engine: Engine = field(default_factory=Engine)
    """Ranks, precision, threads."""

    def check(self) -> None:
        """Raise UserError naming the key when a value is out of range. Called once after parsing."""
        _require(
            (self.model.architecture is None) != (self.model.config is None),
            "model",
            "needs exactly one of architecture and config",
            "Name an open_clip configuration, or give one inline.",
        )
        self.ancestor.check("ancestor")
        self.extraction.check("extraction")
        for name, extraction in self.baselines.learngenes().items():
            extraction.check(f"baselines.{name}")
        self.adaptation.training.check("adaptation.training", allow_zero_steps=True)
        for name in ("scratch", "even", "distil"):
            training: Training | None = getattr(self.baselines, name)
            if training is not None:
                training.check(f"baselines.{name}")
        for index, size in enumerate(self.family.sizes):
            for key in ("image_layers", "text_layers"):
                _require(
                    getattr(size, key) >= 1,
                    f"family.sizes[{index}].{key}",
                    f"is {getattr(size, key)}",
                    "Use 1 or more.",
                )
        if self.engine.keep_features:
            self._check_kept_features()
        names = [size.name for size in self.family.sizes]
        _require(len(set(names)) == len(names), "family.sizes", "holds a size twice", "Remove the repeated one.")

    def _check_kept_features(self) -> None:
        key, augment = "engine.keep_features", self.data.augment
        _require(augment == "none", key, f"keeps features of whole images, data.augment is {augment}", "Use none, or keep no features.")
        losses = {"extraction.loss": self.extraction.loss}
        losses |= {f"baselines.{name}.loss": found.loss for name, found in self.baselines.learngenes().items()}
        losses |= {"adaptation.loss": self.adaptation.loss} if self.adaptation.training.steps else {}
        losses |= {"baselines.distil_loss": self.baselines.distil_loss} if self.baselines.distil is not None else {}
        for name, loss in losses.items():
            problem = f"keeps final features, {name}.hidden is {loss.hidden} and compares hidden states"
            _require(loss.hidden == 0, key, problem, f"Set {name}.hidden to 0, or keep no features.")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain nested dictionaries."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON form: two runs with the same fingerprint compute the same numbers."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def check_keys(path: Path) -> None:
    """Raise UserError for the first key of the YAML file at `path` that no recipe has, naming the nearest one that exists."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}. Mend the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no recipe (a mapping of keys). Copy a shipped recipe and change it.")
    _check_keys(content, Recipe, path, "")


def _check_keys(content: Any, expected: Any, path: Path, prefix: str) -> None:
    if isinstance(content, list):
        for index, item in enumerate(content):
            _check_keys(item, expected, path, f"{prefix.rstrip('.')}[{index}].")
    if not isinstance(content, dict) or not dataclasses.is_dataclass(expected):
        return
    types = typing.get_type_hints(expected)
    for key, value in content.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), list(types), n=1, cutoff=0.0)[0]
            raise UserError(f"{path}: unknown recipe key {prefix}{key}. Nearest valid key: {prefix}{near}.")
        # Optional and list wrappers are looked through: the dataclass inside is what nested keys belong to.
        inner = next((t for t in (types[key], *typing.get_args(types[key])) if dataclasses.is_dataclass(t)), None)
        _check_keys(value, inner, path, f"{prefix}{key}.")


def resolve_recipe_path(name: str) -> Path:
    """A recipe file by path, or a shipped recipe by name (`demo`).

    Raises:
        UserError: neither exists; names the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
    raise UserError(f"no recipe file {name!r}. Give a path to a YAML file or one of the shipped recipes: {names}.")

"""Parts of the recipe on training: loop and optimiser, what is compared with the ancestor, and how a learngene is trained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from mmlg_scale.errors import UserError
from mmlg_scale.errors import require_key as _require
from mmlg_scale.ranges import (
    BatchSize,
    Blocks,
    ClosedUnitInterval,
    Fraction,
    Knots,
    Layers,
    NonNegativeFloat,
    Parts,
    PositiveFloat,
    PositiveInt,
    Rank,
    Steps,
    Students,
    UnitInterval,
)
from mmlg_scale.recipe_identity import LATER


@contextlib.contextmanager
def in_section(key: str) -> Iterator[None]:
    """Around checks of an `Elastic` that name the recipe's keys as those of extraction: their errors name those below `key`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("recipe key extraction", f"recipe key {key}")) from error


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
class Continuation:
    """Training an extracted learngene further on the pairs by the contrastive loss: all sizes at once, without the ancestor.

    The structure, and the sizes that are drawn, are the extraction's.
    """

    training: Training = field(default_factory=Training)
    """The loop's settings: batches as large as for training from scratch, and a tenth to a twentieth of direct pre-training's learning
    rate."""
    growth: ClosedUnitInterval = 0.0
    """As the extraction's."""
    coefficient_rate: NonNegativeFloat = 1.0
    """Learning rate of the coefficients, as a multiple of the blocks'."""
    stem_rate: NonNegativeFloat = 0.3
    """Learning rate of the stems, as a multiple of the blocks'."""


@dataclass
class Extraction(Elastic):
    """Distilling the learngene out of the ancestor."""

    start: Literal["fitted", "random"] = "fitted"
    """Blocks before training: fitted to the ancestor's layers, which are aligned first, by least squares; or random."""
    loss: DistillationLoss = field(default_factory=DistillationLoss)
    """What is compared with the ancestor."""
    continuation: Continuation | None = field(default=None, metadata=LATER)
    """Training of the extracted learngene on the pairs alone, a run of its own; null leaves it out. Descendants are then written from what
    it ends with."""

    def check(self, key: str) -> None:
        super().check(key)
        if self.continuation is not None:
            self.continuation.training.check(f"{key}.continuation.training")

    def continued(self) -> Pretraining | None:
        """The continuation as settings of pre-training; None where there is none."""
        if self.continuation is None:
            return None
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(Elastic)}
        return Pretraining(**(own | vars(self.continuation)))

"""What is read: sections of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmlg_scale.augmentation import Augmentation
from mmlg_scale.errors import require_key as _require
from mmlg_scale.ranges import CaptionCount, ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt, SceneCount
from mmlg_scale.recipe_identity import LATER
from mmlg_scale.sources import Source, check_captions, check_sources


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
    weight by which one is drawn for each sample in every epoch: {alt: 0.5, synthetic: 0.5}. A name that a sample does not have is left out
    of its draw; one that has none of them gives its ordinary captions; both are counted. null: the ordinary captions, as in evaluation."""
    captions_per_image: CaptionCount = field(default=1, metadata=LATER)
    """Captions of a sample that a batch reads. Several share one pass of their image; the contrastive loss is the mean of those with one
    caption of each image. batch_size counts images. Where a sample has fewer, captions are read again, and counted."""
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

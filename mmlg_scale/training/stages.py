"""The kinds of training: what each builds, optimises and charges. The loop knows none of them.

A stage owns a model whose forward takes images and tokens and returns a dictionary of features, hidden states and the logit
multiplier. It says which students a step trains (one model, or several sizes of it), turns their outputs on the whole local batch into a
loss, and says what a step costs. How a batch is cut for the forward passes is no matter of a stage's: see `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import TextLength, over_lengths, parameter_counts, training_flops
from mmlg_scale.digests import file_digest
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.blocks import BlockLayout
from mmlg_scale.learngene.descend import Descendant
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.objectives import contrastive, distillation, feature_distance
from mmlg_scale.streams import Stream, key
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.muon import Place, places_of
from mmlg_scale.training.sizes import TOWERS, SizeDraw, compared_depths, pooled_towers, tap_layers
from mmlg_scale.training.teacher import Autocast, PlainCLIP, Teacher

Terms = dict[str, Tensor]


class Stage(Protocol):
    """What the loop, and a run around it, need."""

    name: str
    spec: towers.ModelSpec
    training: recipe.Training
    model: nn.Module

    @property
    def teacher(self) -> Teacher | None:
        """What the students are compared with, where they are."""
        ...

    @property
    def pool(self) -> int | None:
        """The pairs that training walks through again and again; None: ever new ones."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """torch optimiser groups with their peak rates."""
        ...

    def students(self, step: int) -> list[dict[str, Any]]:
        """What this step trains: for each student the keyword arguments (sizes, tapped layers) of the model's forward."""
        ...

    def patches(self, step: int, first_row: int, num_rows: int) -> Tensor | None:
        """Patch dropout's choice, [num_rows, P'] positions for rows of the global batch from `first_row` on; None: all patches stay."""
        ...

    def targets(self, autocast: Autocast, inputs: Inputs) -> dict[str, Any] | None:
        """The teacher's outputs for a part of the batch, without graph; None where there is no teacher."""
        ...

    def next_targets(self, targets: dict[str, Any] | None, outputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the step's next student is compared with, after one that gave `outputs` on the whole local batch and had `targets`."""
        ...

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_NT: Tensor) -> tuple[Tensor, Terms]:
        """The loss, and its terms by name, of one student's outputs on the whole local batch."""
        ...

    def flops(self, step: int, text_length: TextLength = None, captions: int = 1) -> tuple[int, int]:
        """FLOPs per image that this step costs: (student forward and backward, teacher forward), the mean over the batch.

        Args:
            text_length: tokens of each caption that are computed, see `accounting.TextLength`.
            captions: of each image.
        """
        ...

    def evaluated_sizes(self) -> dict[str, dict[str, int]]:
        """The sizes to evaluate, as keyword arguments of the model's forward, by name; one without arguments where there is one only."""
        ...

    def export(self, state: Mapping[str, Tensor], out: Path) -> dict[str, Any]:
        """Write what was trained below `out`, from the engine's gathered state; returns what result.json says of it."""
        ...


class WithHiddenMaps(nn.Module):
    """A model plus one linear map per tower from its width to the teacher's, the identity at the start, used in training only.

    A model drawn at a smaller width uses the maps' leading columns.
    The maps are applied inside this forward because ZeRO-3 gathers parameters only in the forward of the module that owns them.
    """

    def __init__(self, model: nn.Module, *, image_widths: tuple[int, int], text_widths: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.image_map = self._identity(*image_widths)
        self.text_map = self._identity(*text_widths)

    @staticmethod
    def _identity(width: int, teacher_width: int) -> nn.Linear:
        linear = nn.Linear(width, teacher_width, bias=False)
        nn.init.eye_(linear.weight)
        return linear

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        outputs = self.model(*args, **kwargs)
        if "image_hidden" in outputs:
            outputs["image_hidden"] = [_map_leading(self.image_map, hidden) for hidden in outputs["image_hidden"]]
        if "text_hidden" in outputs:
            outputs["text_hidden"] = [_map_leading(self.text_map, hidden) for hidden in outputs["text_hidden"]]
        return outputs


def _map_leading(linear: nn.Linear, hidden: Tensor) -> Tensor:
    width = hidden.shape[-1]
    return linear(hidden) if width == linear.in_features else nn.functional.linear(hidden, linear.weight[:, :width])


def _with_maps(model: nn.Module, config: Mapping[str, Any], teacher_config: Mapping[str, Any]) -> WithHiddenMaps:
    return WithHiddenMaps(
        model,
        image_widths=(towers.width(config, "image"), towers.width(teacher_config, "image")),
        text_widths=(towers.width(config, "text"), towers.width(teacher_config, "text")),
    )


def draw_patches(config: Mapping[str, Any], seed: int, step: int, first_row: int, num_rows: int) -> Tensor | None:
    """Patch dropout's choice at `step`, [num_rows, P'] positions of the kept patches; None where the configuration drops none.

    Every row of the global batch has its own place in one stream of random numbers, so that neither ranks, micro-batches, recomputation nor
    a resume change what is dropped. Count and drawing (a top-k of random numbers) are open_clip's PatchDropout's.
    """
    share, num_patches = towers.patch_dropout(config), towers.num_patches(config)
    if not share:
        return None
    bits = np.random.PCG64(key(seed, Stream.PATCHES, step))
    bits.advance(first_row * num_patches)  # one 64-bit number is one draw
    draws_BP = torch.from_numpy(np.random.Generator(bits).random((num_rows, num_patches)))
    return draws_BP.topk(max(1, int(num_patches * (1 - share))), dim=-1).indices


# Biases, norms, positions, embeddings and the logit scale are not decayed (open_clip decays its token embedding; a row that a batch does
# not use would shrink without a gradient to hold it). Maps between widths start as the identity, and coefficients near 1: decay towards
# zero would be towards nothing that is wanted.
_UNDECAYED = ("embedding", "logit_", "_map", "coefficients", "vectors")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter of this name: one rule for every kind of training."""
    return parameter.ndim >= 2 and not any(word in name for word in _UNDECAYED)


def parameter_groups(
    model: nn.Module,
    optimizer: recipe.Optimizer,
    factor: Callable[[str], float] = lambda name: 1.0,
    layouts: Mapping[str, BlockLayout] | None = None,
) -> list[dict[str, Any]]:
    """torch optimizer groups: parameters of one rate and one decay together, each at `factor(name)` times the recipe's rate.

    With Muon, decayed groups say where their matrices lie (`muon.Place`); `layouts` are those of flat blocks [K, P], by name.
    """
    groups: dict[tuple[float, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            groups.setdefault((factor(name), is_decayed(name, parameter)), {})[name] = parameter
    return [
        {
            "params": list(named.values()),
            "lr": optimizer.learning_rate * rate,
            "weight_decay": optimizer.weight_decay if decayed else 0.0,
            "matrices": _places(named, layouts or {}) if decayed and optimizer.name == "muon" else [],
        }
        # Matrices first: the first group's rate is the one that is shown, and the order of summation in the gradient's norm is fixed.
        for (rate, decayed), named in sorted(groups.items(), key=lambda item: not item[0][1])
    ]


def _places(named: Mapping[str, nn.Parameter], layouts: Mapping[str, BlockLayout]) -> list[Place]:
    """Where the matrices of these parameters lie, one parameter after the other."""
    found: list[Place] = []
    offset = 0
    for name, parameter in named.items():
        layout = layouts.get(name.removeprefix("model."))
        if layout is None:
            found += places_of(name, parameter.shape, offset)
        else:
            for block in range(parameter.shape[0]):
                for entry in layout.matrices:
                    found += places_of(entry.name, entry.shape, offset + block * layout.matrix_size + entry.offset)
        offset += parameter.numel()
    return found


class ClipStage:
    """Training a plain CLIP: with only the contrastive loss (ancestor, scratch, even), or with a teacher (distillation, adaptation)."""

    def __init__(
        self,
        name: str,
        model: towers.Bundle,
        training: recipe.Training,
        device: torch.device,
        *,
        teacher: Teacher | None = None,
        weights: recipe.DistillationLoss | None = None,
        seed: int = 0,
    ) -> None:
        assert (teacher is None) == (weights is None)
        self.name, self.spec, self.training, self.teacher, self.weights = name, model.spec, training, teacher, weights
        self.seed = seed
        clip = towers.build_clip(self.config, seed=0)
        clip.load_state_dict(dict(model.state))
        wrapped: nn.Module = PlainCLIP(clip)
        if teacher is not None and weights is not None and weights.hidden:
            wrapped = _with_maps(wrapped, self.config, teacher.spec.config)
        self.model = wrapped.to(device)

    @property
    def config(self) -> dict[str, Any]:
        """The trained model's open_clip configuration."""
        return self.spec.config

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.training.optimizer)

    @property
    def pool(self) -> int | None:
        return self.weights.teacher_pool if self.weights is not None else None

    def students(self, step: int) -> list[dict[str, Any]]:
        if not self._hidden_depths:
            return [{}]
        return [{f"tap_{tower}": tap_layers(self._hidden_depths, towers.num_layers(self.config, tower)) for tower in TOWERS}]

    @property
    def _hidden_depths(self) -> Sequence[float]:
        return compared_depths(self.weights)

    def patches(self, step: int, first_row: int, num_rows: int) -> Tensor | None:
        return draw_patches(self.config, self.seed, step, first_row, num_rows)

    def targets(self, autocast: Autocast, inputs: Inputs) -> dict[str, Any] | None:
        return None if self.teacher is None else self.teacher(inputs, autocast, self._hidden_depths)

    def next_targets(self, targets: dict[str, Any] | None, outputs: Mapping[str, Any]) -> dict[str, Any] | None:
        return targets

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_NT: Tensor) -> tuple[Tensor, Terms]:
        if targets is None or self.weights is None:
            loss = contrastive(outputs)
            return loss, {"contrastive": loss}
        return distillation(outputs, targets, text_NT, self.weights)

    def flops(self, step: int, text_length: TextLength = None, captions: int = 1) -> tuple[int, int]:
        depths = self._hidden_depths
        pooled = pooled_towers(self.config, depths)
        own = over_lengths(lambda length: training_flops(self.config, text_length=length, captions=captions, pooled=pooled), text_length)
        runs = _in_first_pass(step, self.training, self.pool)
        return own, self.teacher.flops(depths, text_length, captions) if self.teacher is not None and runs else 0

    def evaluated_sizes(self) -> dict[str, dict[str, int]]:
        return {"": {}}

    def export(self, state: Mapping[str, Tensor], out: Path) -> dict[str, Any]:
        """OUT/model, an open_clip folder."""
        model = towers.Bundle(self.spec, _strip(state, "clip."))
        towers.export(model, out / "model", overwrite=True)
        counts = parameter_counts(model.state)
        blocks = counts["image_blocks"] + counts["text_blocks"]
        return _described(self.config, TOWERS) | {"params": counts["total"], "block_params": blocks}


class TowerStage(ClipStage):
    """One tower of a descendant, evaluated together with the ancestor's other tower, not trained; only the tower is exported."""

    def __init__(self, descendant: Descendant, ancestor: towers.Bundle, device: torch.device) -> None:
        self.descendant = descendant

        def is_own(name: str) -> bool:
            return not name.startswith("logit_") and name.startswith("visual.") == (descendant.modality == "image")

        pair = {name: tensor for name, tensor in ancestor.state.items() if not is_own(name)}
        pair |= {name: tensor for name, tensor in descendant.state.items() if is_own(name)}
        super().__init__("mmlg", towers.Bundle(descendant.spec, pair), recipe.Training(steps=0), device)

    def export(self, state: Mapping[str, Tensor], out: Path) -> dict[str, Any]:
        """OUT/model, the tower's folder."""
        self.descendant.export(out / "model", overwrite=True)
        params = sum(tensor.numel() for tensor in self.descendant.state.values())
        return _described(self.config, (self.descendant.modality,)) | {"params": params}


def _described(config: Mapping[str, Any], present: Sequence[str]) -> dict[str, Any]:
    """Depths (None for a tower that is not there) and widths of both towers."""
    layers = {f"{tower}_layers": towers.num_layers(config, tower) if tower in present else None for tower in TOWERS}
    return layers | {f"{tower}_width": towers.width(config, tower) for tower in TOWERS}


class ElasticStage:
    """Training the auxiliary CLIP, whose layers are weighted sums of the learngene's blocks, at a random size each step.

    As it is, by the contrastive loss on the pairs: pre-training without an ancestor. With `Pretraining.in_place` the features of a step's
    greatest size, its first, are what the other sizes are compared with.
    """

    name = "pretraining"
    teacher: Teacher | None = None
    pool: int | None = None

    def __init__(
        self,
        settings: recipe.Elastic,
        auxiliary: AuxiliaryCLIP,
        spec: towers.ModelSpec,
        device: torch.device,
        *,
        seed: int,
        compose_per_layer: bool = False,
    ) -> None:
        self.settings, self.training, self.seed = settings, settings.training, seed
        self.spec, self.compose_per_layer = spec, compose_per_layer
        self.in_place = settings.in_place if isinstance(settings, recipe.Pretraining) else 0.0
        self.draw = SizeDraw(settings, spec.config, seed)
        self.auxiliary = auxiliary
        self.model: nn.Module = auxiliary.to(device)

    def sizes(self, step: int) -> list[dict[str, int]]:
        """The sizes drawn at `step`: the same on every rank, and after every resume."""
        return self.draw.sizes(step)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Blocks and vectors at the recipe's rate, coefficients and all else at multiples of it."""

        def factor(name: str) -> float:
            kind = name.removeprefix("model.")
            if kind.startswith(("multimodal", "unimodal", "vectors")):
                return 1.0
            return self.settings.coefficient_rate if kind.startswith("coefficients") else self.settings.stem_rate

        structure = self.auxiliary.structure
        layouts = {"multimodal": structure.layout(structure.wide)} | {f"unimodal_{tower}": structure.layout(tower) for tower in TOWERS}
        return parameter_groups(self.model, self.training.optimizer, factor, layouts)

    def students(self, step: int) -> list[dict[str, Any]]:
        return [{**size, "compose_per_layer": self.compose_per_layer} for size in self.sizes(step)]

    def patches(self, step: int, first_row: int, num_rows: int) -> Tensor | None:
        return draw_patches(self.spec.config, self.seed, step, first_row, num_rows)

    def targets(self, autocast: Autocast, inputs: Inputs) -> dict[str, Any] | None:
        return None

    def next_targets(self, targets: dict[str, Any] | None, outputs: Mapping[str, Any]) -> dict[str, Any] | None:
        if self.in_place and targets is None:
            return {f"{tower}_features": outputs[f"{tower}_features"].detach() for tower in TOWERS}
        return targets

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_NT: Tensor) -> tuple[Tensor, Terms]:
        loss = contrastive(outputs)
        terms = {"contrastive": loss}
        if targets is not None:
            names = [f"{tower}_features" for tower in TOWERS]
            terms["in_place"] = torch.stack([feature_distance(outputs[name], targets[name]) for name in names]).sum()
            loss = loss + self.in_place * terms["in_place"]
        return loss, terms

    def flops(self, step: int, text_length: TextLength = None, captions: int = 1) -> tuple[int, int]:
        return self.draw.flops(step, text_length, captions), 0

    def evaluated_sizes(self) -> dict[str, dict[str, int]]:
        return self.draw.evaluated()

    def auxiliary_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The learngene's part of the engine's gathered state (the maps are left behind)."""
        return _strip(state, "model.") if isinstance(self.model, WithHiddenMaps) else dict(state)

    def export(self, state: Mapping[str, Tensor], out: Path) -> dict[str, Any]:
        """OUT/learngene.safetensors."""
        learngene = Learngene.from_auxiliary(
            self.auxiliary.structure,
            self.auxiliary_state(state),
            spec=self.spec,
            extraction=asdict(self.settings),
            trained=self.draw.trained_range(),
            dtype=self.settings.file_dtype,
        )
        file = out / "learngene.safetensors"
        learngene.save(file)
        return {
            "params": learngene.num_params,
            "bytes": file.stat().st_size,
            "sha256": file_digest(file, "learngene"),
            "block_params": learngene.block_params,
            "stem_params": learngene.stem_params,
        }


class ExtractionStage(ElasticStage):
    """Distilling the learngene: the auxiliary CLIP is compared with the frozen ancestor."""

    name = "extraction"
    settings: recipe.Extraction

    def __init__(
        self,
        settings: recipe.Extraction,
        auxiliary: AuxiliaryCLIP,
        teacher: Teacher,
        device: torch.device,
        *,
        seed: int,
        compose_per_layer: bool = False,
    ) -> None:
        super().__init__(settings, auxiliary, teacher.spec, device, seed=seed, compose_per_layer=compose_per_layer)
        self.teacher: Teacher = teacher
        self.pool = settings.loss.teacher_pool
        if settings.loss.hidden:
            self.model = _with_maps(auxiliary, teacher.spec.config, teacher.spec.config).to(device)

    def students(self, step: int) -> list[dict[str, Any]]:
        return [
            student | {f"tap_{tower}": tap_layers(self._hidden_depths, student[f"{tower}_layers"]) for tower in TOWERS}
            for student in super().students(step)
        ]

    @property
    def _hidden_depths(self) -> Sequence[float]:
        return compared_depths(self.settings.loss)

    def targets(self, autocast: Autocast, inputs: Inputs) -> dict[str, Any] | None:
        return self.teacher(inputs, autocast, self._hidden_depths)

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_NT: Tensor) -> tuple[Tensor, Terms]:
        assert targets is not None
        return distillation(outputs, targets, text_NT, self.settings.loss)

    def flops(self, step: int, text_length: TextLength = None, captions: int = 1) -> tuple[int, int]:
        runs = _in_first_pass(step, self.training, self.pool)
        teacher = self.teacher.flops(self._hidden_depths, text_length, captions) if runs else 0
        return self.draw.flops(step, text_length, captions), teacher


def _in_first_pass(step: int, training: recipe.Training, pool: int | None) -> bool:
    """Whether the teacher is charged for a step: always without a pool, and else in the first pass through it.

    By the step, not by what was computed: a resumed run finds outputs of steps that it repeats, and costs what it would have cost.
    """
    return pool is None or step * training.batch_size < pool


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries below `prefix` (wherever a wrapper put it), without it."""
    return {
        name.removeprefix("model.").removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.removeprefix("model.").startswith(prefix) or name.startswith(prefix)
    }

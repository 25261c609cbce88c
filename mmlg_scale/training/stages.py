"""The kinds of training: what each builds, optimises and charges. The loop knows none of them.

A stage owns a model whose forward takes images and tokens and returns a dictionary of features, hidden states and the logit
multiplier. It says which students a step trains (one model, or several sizes of it), turns their outputs on the whole local batch into a
loss, and says what a step costs. How a batch is cut for the forward passes is no matter of a stage's: see `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import forward_flops
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.objectives import contrastive, distillation

Autocast = Callable[[], AbstractContextManager[Any]]
Terms = dict[str, Tensor]


class Stage(Protocol):
    """What the loop needs."""

    name: str
    training: recipe.Training
    model: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """torch optimiser groups with their peak rates."""
        ...

    def students(self, step: int) -> list[dict[str, Any]]:
        """What this step trains: for each student the keyword arguments (sizes, tapped layers) of the model's forward."""
        ...

    def patches(self, step: int, first_row: int, num_rows: int) -> Tensor | None:
        """Patch dropout's choice, [num_rows, P'] positions for rows of the global batch from `first_row` on; None: all patches stay."""
        ...

    def targets(
        self, autocast: Autocast, image_BCHW: Tensor, text_BT: Tensor, patches_BP: Tensor | None, samples_B2: Tensor | None = None
    ) -> dict[str, Any] | None:
        """The teacher's outputs for a part of the batch, without graph; None where there is no teacher.

        `samples_B2`: the pairs' places in the training split, (sample, caption), by which kept features are found.
        """
        ...

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_BT: Tensor) -> tuple[Tensor, Terms]:
        """The loss, and its terms by name, of one student's outputs on the whole local batch."""
        ...

    def flops(self, step: int) -> tuple[int, int]:
        """FLOPs per sample that this step costs: (student forward and backward, teacher forward)."""
        ...

    def evaluated_sizes(self) -> dict[str, dict[str, int]]:
        """The sizes to evaluate, as keyword arguments of the model's forward, by name; one without arguments where there is one only."""
        ...


def tap_layers(depths: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """The layer nearest to each relative depth, counted from 1 (halves round up, and layer 0 is never compared)."""
    return tuple(max(1, int(depth * num_layers + 0.5)) for depth in depths)


class PlainCLIP(nn.Module):
    """An open_clip CLIP with the forward that stages share."""

    def __init__(self, clip: towers.CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        tap_image: Sequence[int] = (),
        tap_text: Sequence[int] = (),
        patches: Tensor | None = None,
        checkpoint: bool = False,
    ) -> dict[str, Any]:
        outputs = towers.logits_outputs(self.clip)
        if image is not None:
            outputs["image_features"], outputs["image_hidden"] = towers.encode_image_with_hidden(
                self.clip, image, tap_image, patches=patches, checkpoint=checkpoint
            )
        if text is not None:
            outputs["text_features"], outputs["text_hidden"] = towers.encode_text_with_hidden(
                self.clip, text, tap_text, checkpoint=checkpoint
            )
        return outputs


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


class Ancestor(Protocol):
    """What a student is compared with."""

    config: dict[str, Any]
    image_layers: int
    text_layers: int
    flops: int
    """Of one sample's pass in every step."""

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        autocast: Autocast,
        depths: Sequence[float],
        patches_BP: Tensor | None = None,
        samples_B2: Tensor | None = None,
    ) -> dict[str, Any]:
        """Features, hidden states at relative depths, and what the logits need, without graph."""
        ...


class Teacher:
    """The frozen ancestor: a plain module outside the engine. With `shard` each rank keeps its share of every parameter."""

    def __init__(self, config: dict[str, Any], state: Mapping[str, Tensor], device: torch.device, *, shard: bool = False) -> None:
        self.config = config
        self.image_layers = towers.num_layers(config, "image")
        self.text_layers = towers.num_layers(config, "text")
        self.flops = forward_flops(config)["total"]
        clip = towers.build_clip(config, seed=0)
        clip.load_state_dict(dict(state))
        self.model = PlainCLIP(clip).to(device).eval().requires_grad_(False)
        if shard and dist.get_world_size() > 1:
            _shard(self.model, device)

    @torch.no_grad()
    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        autocast: Autocast,
        depths: Sequence[float],
        patches_BP: Tensor | None = None,
        samples_B2: Tensor | None = None,
    ) -> dict[str, Any]:
        """Outputs on whole images; hidden states of the image tower only at `patches_BP` (and the class token), where it is given."""
        with autocast():
            outputs = self.model(
                image,
                text,
                tap_image=tap_layers(depths, self.image_layers),
                tap_text=tap_layers(depths, self.text_layers),
            )
        if patches_BP is not None:
            outputs["image_hidden"] = [towers.keep_patches(hidden, patches_BP) for hidden in outputs["image_hidden"]]
        return outputs


def _shard(model: PlainCLIP, device: torch.device) -> None:
    """torch's fully sharded data parallelism: a block's parameters are whole only while it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for transformer in (model.clip.visual.transformer, model.clip.transformer):
        for block in transformer.resblocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}  # which it cannot shard
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


def draw_patches(config: Mapping[str, Any], seed: int, step: int, first_row: int, num_rows: int) -> Tensor | None:
    """Patch dropout's choice at `step`, [num_rows, P'] positions of the kept patches; None where the configuration drops none.

    Every row of the global batch has its own place in one stream of random numbers, so that neither ranks, micro-batches, recomputation nor
    a resume change what is dropped. Count and drawing (a top-k of random numbers) are open_clip's PatchDropout's.
    """
    share, num_patches = towers.patch_dropout(config), towers.num_patches(config)
    if not share:
        return None
    bits = np.random.PCG64([seed, step, _PATCH_STREAM])
    bits.advance(first_row * num_patches)  # one 64-bit number is one draw
    draws_BP = torch.from_numpy(np.random.Generator(bits).random((num_rows, num_patches)))
    return draws_BP.topk(max(1, int(num_patches * (1 - share))), dim=-1).indices


_PATCH_STREAM = 1


# Biases, norms, positions, embeddings and the logit scale are not decayed (open_clip decays its token embedding; a row that a batch does
# not use would shrink without a gradient to hold it).
_UNDECAYED = ("positional_embedding", "class_embedding", "token_embedding", "logit_scale", "logit_bias")


def decay_groups(model: nn.Module, optimizer: recipe.Optimizer, factor: float = 1.0) -> list[dict[str, Any]]:
    """Two groups, matrices with weight decay and the rest without, at `factor` times the recipe's rate."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(word in name for word in _UNDECAYED)
        (decayed if is_matrix else free).append(parameter)
    rate = optimizer.learning_rate * factor
    groups = [
        {"params": decayed, "lr": rate, "weight_decay": optimizer.weight_decay},
        {"params": free, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class ClipStage:
    """Training a plain CLIP: by the contrastive loss alone (ancestor, scratch, even), or with a teacher (distillation, adaptation)."""

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        state: Mapping[str, Tensor],
        training: recipe.Training,
        device: torch.device,
        *,
        teacher: Ancestor | None = None,
        weights: recipe.DistillationLoss | None = None,
        seed: int = 0,
    ) -> None:
        assert (teacher is None) == (weights is None)
        self.name, self.config, self.training, self.teacher, self.weights = name, config, training, teacher, weights
        self.seed = seed
        clip = towers.build_clip(config, seed=0)
        clip.load_state_dict(dict(state))
        model: nn.Module = PlainCLIP(clip)
        if teacher is not None and weights is not None and weights.hidden:
            model = _with_maps(model, config, teacher.config)
        self.model = model.to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.model, self.training.optimizer)

    def students(self, step: int) -> list[dict[str, Any]]:
        if not self._hidden_depths:
            return [{}]
        return [{f"tap_{tower}": tap_layers(self._hidden_depths, towers.num_layers(self.config, tower)) for tower in ("image", "text")}]

    @property
    def _hidden_depths(self) -> Sequence[float]:
        return self.weights.hidden_depths if self.weights is not None and self.weights.hidden else ()

    def patches(self, step: int, first_row: int, num_rows: int) -> Tensor | None:
        return draw_patches(self.config, self.seed, step, first_row, num_rows)

    def targets(
        self, autocast: Autocast, image_BCHW: Tensor, text_BT: Tensor, patches_BP: Tensor | None, samples_B2: Tensor | None = None
    ) -> dict[str, Any] | None:
        return None if self.teacher is None else self.teacher(image_BCHW, text_BT, autocast, self._hidden_depths, patches_BP, samples_B2)

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_BT: Tensor) -> tuple[Tensor, Terms]:
        if targets is None or self.weights is None:
            loss = contrastive(outputs)
            return loss, {"contrastive": loss}
        return distillation(outputs, targets, text_BT, self.weights)

    def flops(self, step: int) -> tuple[int, int]:
        return 3 * forward_flops(self.config)["total"], self.teacher.flops if self.teacher else 0

    def evaluated_sizes(self) -> dict[str, dict[str, int]]:
        return {"": {}}

    def clip_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The open_clip part of the engine's gathered state."""
        return _strip(state, "clip.")


class ExtractionStage:
    """Training the auxiliary CLIP, whose layers are weighted sums of the learngene's blocks, at a random size each step."""

    name = "extraction"

    def __init__(
        self,
        settings: recipe.Extraction,
        auxiliary: AuxiliaryCLIP,
        teacher: Ancestor,
        device: torch.device,
        *,
        seed: int,
    ) -> None:
        self.settings, self.training, self.teacher, self.seed = settings, settings.training, teacher, seed
        self.max_layers = {
            "image": settings.max_layers or teacher.image_layers,
            "text": settings.max_layers or teacher.text_layers,
        }
        for tower, most in self.max_layers.items():
            if most < settings.min_layers:
                raise UserError(f"recipe key extraction.min_layers: is {settings.min_layers}, the {tower} tower has {most}. Use fewer.")
        self.auxiliary = auxiliary
        model: nn.Module = auxiliary
        if settings.loss.hidden:
            model = _with_maps(auxiliary, teacher.config, teacher.config)
        self.model = model.to(device)

    def sizes(self, step: int) -> list[dict[str, int]]:
        """The sizes drawn at `step`: the same on every rank, and after every resume."""
        return [self._size([self.seed, step, *([index] if index else [])]) for index in range(self.settings.students_per_step)]

    def _size(self, seed: list[int]) -> dict[str, int]:
        """One depth for both towers, scaled down for the one that has fewer layers to draw from, and a width for each."""
        generator = np.random.default_rng(seed)
        layers = self._depths(int(generator.integers(self.settings.min_layers, max(self.max_layers.values()), endpoint=True)))
        shares = generator.choice(self.settings.width_shares, size=2)
        return layers | {f"{tower}_width": self._width(tower, share) for tower, share in zip(("image", "text"), shares, strict=True)}

    def _depths(self, layers: int) -> dict[str, int]:
        """Both towers' depths where the deeper one has `layers`: equally far between the least and each tower's most."""
        least, most = self.settings.min_layers, max(self.max_layers.values())
        share = (layers - least) / max(1, most - least)
        return {f"{tower}_layers": least + int(share * (own - least) + 0.5) for tower, own in self.max_layers.items()}

    def _width(self, tower: str, share: float) -> int:
        """The residual width with this share of the tower's heads, rounded to whole ones."""
        head = towers.head_dim(self.teacher.config, tower)
        heads = towers.width(self.teacher.config, tower) // head
        return head * max(1, int(share * heads + 0.5))

    def parameter_groups(self) -> list[dict[str, Any]]:
        optimizer = self.training.optimizer
        rates = {"blocks": 1.0, "coefficients": self.settings.coefficient_rate, "vectors": 1.0}
        groups = [
            {
                "params": parameters,
                "lr": optimizer.learning_rate * rates.get(name, self.settings.stem_rate),
                "weight_decay": optimizer.weight_decay if name in ("blocks", "stem_matrices") else 0.0,
            }
            for name, parameters in self.auxiliary.parameter_groups().items()
            if parameters
        ]
        if isinstance(self.model, WithHiddenMaps):
            maps = [*self.model.image_map.parameters(), *self.model.text_map.parameters()]
            groups.append({"params": maps, "lr": optimizer.learning_rate * self.settings.stem_rate, "weight_decay": 0.0})
        return groups

    def students(self, step: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for size in self.sizes(step):
            taps = {f"tap_{tower}": tap_layers(self._hidden_depths, size[f"{tower}_layers"]) for tower in ("image", "text")}
            found.append(size | taps | {"compose_per_layer": self.settings.compose_per_layer})
        return found

    @property
    def _hidden_depths(self) -> Sequence[float]:
        return self.settings.loss.hidden_depths if self.settings.loss.hidden else ()

    def patches(self, step: int, first_row: int, num_rows: int) -> Tensor | None:
        return draw_patches(self.teacher.config, self.seed, step, first_row, num_rows)

    def targets(
        self, autocast: Autocast, image_BCHW: Tensor, text_BT: Tensor, patches_BP: Tensor | None, samples_B2: Tensor | None = None
    ) -> dict[str, Any] | None:
        return self.teacher(image_BCHW, text_BT, autocast, self._hidden_depths, patches_BP, samples_B2)

    def objective(self, outputs: Mapping[str, Any], targets: Mapping[str, Any] | None, text_BT: Tensor) -> tuple[Tensor, Terms]:
        assert targets is not None
        return distillation(outputs, targets, text_BT, self.settings.loss)

    def flops(self, step: int) -> tuple[int, int]:
        students = sum(forward_flops(towers.with_sizes(self.teacher.config, **size))["total"] for size in self.sizes(step))
        return 3 * students, self.teacher.flops

    def evaluated_sizes(self) -> dict[str, dict[str, int]]:
        least, most = self.settings.min_layers, max(self.max_layers.values())
        sizes = [self._depths(layers) for layers in sorted({least, (least + most) // 2, most})]
        narrowest = min(self.settings.width_shares)
        if narrowest < 1:
            sizes.append(sizes[-1] | {f"{tower}_width": self._width(tower, narrowest) for tower in ("image", "text")})
        return {recipe.Size(**size).name: size for size in sizes}  # type: ignore[arg-type]

    def auxiliary_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The learngene's part of the engine's gathered state (the maps are left behind)."""
        return _strip(state, "model.") if isinstance(self.model, WithHiddenMaps) else dict(state)


def _strip(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries below `prefix` (wherever a wrapper put it), without it."""
    return {
        name.removeprefix("model.").removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.removeprefix("model.").startswith(prefix) or name.startswith(prefix)
    }

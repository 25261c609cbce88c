"""What students are compared with: the frozen ancestor, computing every step or once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmlg_scale import towers
from mmlg_scale.accounting import TextLength, forward_flops, over_lengths
from mmlg_scale.errors import UserError
from mmlg_scale.ranks import on_first_rank, several_ranks
from mmlg_scale.reading import one_line
from mmlg_scale.training.features import REMEDY, check_features, open_features
from mmlg_scale.training.folder import RESULT_FILE, differences, result_of
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.sizes import pooled_towers, tap_layers

Autocast = Callable[[], AbstractContextManager[Any]]


class PlainCLIP(nn.Module):
    """A CLIP with the forward that stages share."""

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
        packing: towers.Packing | None = None,
        checkpoint: bool = False,
    ) -> dict[str, Any]:
        outputs = towers.logits_outputs(self.clip)
        if image is not None:
            outputs["image_features"], outputs["image_hidden"] = towers.encode_image_with_hidden(
                self.clip, image, tap_image, patches=patches, checkpoint=checkpoint
            )
        if text is not None:
            outputs["text_features"], outputs["text_hidden"] = towers.encode_text_with_hidden(
                self.clip, text, tap_text, packing=packing, checkpoint=checkpoint
            )
        return outputs


class Teacher(Protocol):
    """What a student is compared with."""

    spec: towers.ModelSpec

    def flops(self, depths: Sequence[float], text_length: TextLength = None, captions: int = 1) -> int:
        """Of one image's pass in every step; hidden states at `depths` are compared, its captions have that many tokens (None: all)."""
        ...

    @property
    def cost(self) -> dict[str, Any] | None:
        """What was spent once, before any step: {"flops", "seconds"}."""
        ...

    def __call__(self, inputs: Inputs, autocast: Autocast, depths: Sequence[float]) -> dict[str, Any]:
        """Features, hidden states at relative depths, and what the logits need, without graph."""
        ...

    def flush(self) -> None:
        """See that what this rank wrote to be kept is on the disk. On every rank, before the last evaluation."""
        ...

    def forget(self) -> None:
        """Remove what was written for this run only, which is complete."""
        ...


class LiveTeacher:
    """The ancestor as a plain module outside the engine. With `shard` each rank keeps its part of every parameter."""

    cost: None = None

    def __init__(self, model: towers.Bundle, device: torch.device, *, shard: bool = False, compiled: bool = False) -> None:
        self.spec, self.device = model.spec, device
        clip = towers.build_clip(model.spec.config, seed=0)
        clip.load_state_dict(dict(model.state))
        self._logits = {name: value.detach().clone() for name, value in towers.logits_outputs(clip).items()}
        self.model = PlainCLIP(clip).to(device).eval().requires_grad_(False)
        if compiled:
            towers.compile_blocks(self.model)
        self.sharded = shard and several_ranks()
        if self.sharded:
            _shard(self.model, device)

    def logits(self, device: torch.device) -> dict[str, Tensor]:
        """What the logits need, without a pass."""
        self._logits = {name: value.to(device) for name, value in self._logits.items()}  # once: a copy to a device waits for it
        return dict(self._logits)

    def flush(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def flops(self, depths: Sequence[float], text_length: TextLength = None, captions: int = 1) -> int:
        config = self.spec.config
        pooled = pooled_towers(config, depths)

        def flops(length: int | None) -> int:
            return forward_flops(config, text_length=length, captions=captions, pooled=pooled)["total"]

        return over_lengths(flops, text_length)

    @torch.no_grad()
    def __call__(self, inputs: Inputs, autocast: Autocast, depths: Sequence[float]) -> dict[str, Any]:
        """Outputs on whole images; hidden states of the image tower only at the kept patches (and the class token)."""
        layers = {tower: towers.num_layers(self.spec.config, tower) for tower in ("image", "text")}
        taps = {f"tap_{tower}": tap_layers(depths, count) for tower, count in layers.items()}
        with autocast():
            outputs = self.model(inputs.image, inputs.text, packing=inputs.packing, **taps)
        if inputs.patches is not None:
            outputs["image_hidden"] = [towers.keep_patches(hidden, inputs.patches) for hidden in outputs["image_hidden"]]
        return outputs


def _shard(model: PlainCLIP, device: torch.device) -> None:
    """torch's fully sharded data parallelism: a block's parameters are whole only while it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for transformer in (model.clip.visual.transformer, model.clip.transformer):
        for block in transformer.resblocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}  # which it cannot shard
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


class CachedTeacher:
    """The ancestor's features of the training split, read from what `mmlg features` wrote; only final features are compared.

    Raises:
        UserError: the folder has no finished features, or those of another ancestor, data set or precision.
    """

    def __init__(self, folder: Path, spec: towers.ModelSpec, expected: Mapping[str, Any]) -> None:
        self.folder, self.spec = folder, spec
        result = result_of(folder)
        if result is None:
            raise UserError(f"{folder} has no finished features of an ancestor. Write them with mmlg features; it resumes.")
        differing = differences(folder, expected)
        if differing is None or differing:
            raise UserError(
                f"{folder} has the features of another run: {'; '.join(differing or ['no run.json'])}. "
                "Write them with mmlg features --out in another folder."
            )
        try:
            self.cost = {key: result[key] for key in ("flops", "seconds")}
            self._logits = {name: torch.tensor([float(value)]) for name, value in result["logits"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / RESULT_FILE} is damaged ({one_line(error)}). {REMEDY}") from error
        on_first_rank(lambda: check_features(folder, result))
        self._image, self._text, self._starts = open_features(folder)

    def flops(self, depths: Sequence[float], text_length: TextLength = None, captions: int = 1) -> int:
        return 0

    def __call__(self, inputs: Inputs, autocast: Autocast, depths: Sequence[float]) -> dict[str, Any]:
        """What the ancestor computes on these pairs, looked up by their places in the data set."""
        assert inputs.samples is not None
        assert not depths
        samples, captions_Bk = inputs.samples.numpy()[:, 0], inputs.samples.numpy()[:, 1:]
        found = {"image": self._image[samples], "text": self._text[(self._starts[samples][:, None] + captions_Bk).reshape(-1)]}
        bad = np.isnan(found["image"]).any(axis=1)
        if bad.any():
            raise UserError(
                f"{self.folder} has no features of sample {samples[bad][0]}, which could not be read then. "
                "Remove the folder and write them again with mmlg features."
            )
        device = inputs.text.device
        features = {f"{name}_features": torch.from_numpy(rows).to(device, non_blocking=True) for name, rows in found.items()}
        self._logits = {name: value.to(device) for name, value in self._logits.items()}  # once: a copy to a device waits for it
        return features | self._logits

    def flush(self) -> None:
        pass

    def forget(self) -> None:
        pass

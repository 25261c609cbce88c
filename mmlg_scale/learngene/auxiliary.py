"""The auxiliary CLIP: its layers are weighted sums of the learngene's blocks. It is what extraction trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmlg_scale import towers
from mmlg_scale.learngene.blocks import BlockLayout
from mmlg_scale.learngene.compose import Sizes, compose_layers, compose_lazily, narrow_state
from mmlg_scale.learngene.embedding import FactorisedEmbedding, factorise_stem, factorised_shapes
from mmlg_scale.learngene.mixing import legendre
from mmlg_scale.learngene.structure import STEM, TOWERS, Structure, stem_shapes

# Matrices that write into the residual stream: scaled down with depth at the start, as in CLIP and GPT-2.
RESIDUAL_OUTPUTS = ("attn.out_proj.weight", "mlp.c_proj.weight")
COEFFICIENT_NOISE = 0.05


class AuxiliaryCLIP(towers.CompiledBlocks):
    """Owns every tensor of the learngene and composes stems and layers inside its own forward.

    One module owns all parameters because ZeRO-3 gathers them only in the forward of their owner; the modules that compute are kept out of
    the registry, on the meta device, and are called with these tensors. A parameter's name is the learngene's with / for each dot.

    Parameters (P: numbers in a block's matrices, V: in its vectors, of the tower or, for `multimodal`, of the wider one):
        multimodal: [K_M, P], blocks shared by both towers.
        unimodal_image, unimodal_text: [K_U, P], blocks of one tower.
        coefficients_image, coefficients_text: [R, G, K_M + K_U] for the G matrices of a block, multimodal blocks first; basis `knots` only.
        vectors_image, vectors_text: LayerNorms and biases, [R, V] at each knot or [K, V] for each block.
        residual_map_*, head_map_*: [d, d_wide], with learned maps only.
        stem/...: an open_clip CLIP's tensors outside its blocks; with a factorised embedding, its factors in its place.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        for name, shape in structure.shapes().items():
            self.register_parameter(_parameter_name(name), nn.Parameter(torch.empty(shape)))
        # A dictionary in a list is not searched for modules.
        self._runners: list[dict[tuple[int | None, int | None], tuple[_StemRunner, dict[str, tuple[int, ...]]]]] = [{}]
        self._forms: dict[tuple[str, int | None], towers.BlockForm] = {}

    @classmethod
    def from_ancestor(
        cls, ancestor_state: Mapping[str, Tensor], structure: Structure, *, seed: int, fitted: Mapping[str, Tensor] | None = None
    ) -> AuxiliaryCLIP:
        """Stems copied from the ancestor; blocks random like a fresh block, or `fitted` to its layers (`inherit`); coefficients centred.

        A factorised embedding starts as the nearest one of its rank. A multimodal block's coefficient starts at 1 at every depth, the j-th
        unimodal block's at the Legendre polynomial of degree j in 2t - 1 (the first: 2t - 1 itself), each with noise of 0.05, so that no
        two blocks start alike; fitted coefficients get the same noise. Learned maps start as slices.
        """
        model = cls(structure)
        generator = torch.Generator().manual_seed(seed)
        depth = max(towers.num_layers(structure.config, tower) for tower in TOWERS)
        with torch.no_grad():
            stem = factorise_stem(towers.split_state(ancestor_state)[0], structure.embedding_rank)
            for name, tensor in stem.items():
                model._get(STEM + name).copy_(tensor)
            for name, tower in (("multimodal", structure.wide), ("unimodal_image", "image"), ("unimodal_text", "text")):
                for block_P in model._get(name):
                    _fill_block(structure.layout(tower), block_P, depth, generator)
            for tower in TOWERS:
                if structure.basis == "knots":
                    _fill_coefficients(model._get(f"coefficients_{tower}"), structure.num_multimodal, generator)
                _fill_vectors(structure, structure.layout(tower), model._get(f"vectors_{tower}"))
                if structure.mapped(tower):
                    for kind in ("residual_map", "head_map"):
                        nn.init.eye_(model._get(f"{kind}_{tower}"))
            for name, tensor in fitted.items() if fitted is not None else ():
                noise = COEFFICIENT_NOISE * torch.randn(tensor.shape, generator=generator) if name.startswith("coefficients") else 0.0
                model._get(name).copy_(tensor + noise)
        return model

    @classmethod
    def fresh(cls, structure: Structure, *, seed: int) -> AuxiliaryCLIP:
        """Stems, blocks and coefficients random: what is pre-trained without an ancestor."""
        return cls.from_ancestor(towers.build_clip(structure.config, seed=seed).state_dict(), structure, seed=seed)

    @classmethod
    def of_tensors(cls, structure: Structure, tensors: Mapping[str, Tensor]) -> AuxiliaryCLIP:
        """With the tensors of a learngene of that structure, by its names: `learngene_tensors`, the other way round."""
        model = cls(structure)
        with torch.no_grad():
            for name in structure.shapes():
                model._get(name).copy_(tensors[name])
        return model

    def _get(self, name: str) -> Tensor:
        return self.get_parameter(_parameter_name(name))

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        image_layers: int | None = None,
        text_layers: int | None = None,
        image_width: int | None = None,
        text_width: int | None = None,
        tap_image: Sequence[int] = (),
        tap_text: Sequence[int] = (),
        patches: Tensor | None = None,
        packing: towers.Packing | None = None,
        checkpoint: bool = False,
        compose_per_layer: bool = False,
    ) -> dict[str, Any]:
        """Features (not normalised), hidden states after the tapped layers, and the logit multiplier, at the given sizes.

        `patches`, `packing` and `checkpoint` as in `towers.run_image_tower` and `towers.run_text_tower`. With `compose_per_layer` a layer's
        matrices are summed when the layer runs, and with `checkpoint` again in the backward pass: only one layer's are in memory.
        """
        runner, shapes = self._runner(image_width, text_width)
        stem = {f"clip.{name}": tensor for name, tensor in narrow_state(shapes, lambda name: self._get(STEM + name)).items()}
        sizes: dict[str, tuple[int, int | None]] = {}
        for tower, given, num_layers, width in (("image", image, image_layers, image_width), ("text", text, text_layers, text_width)):
            if given is not None:
                assert num_layers is not None
                sizes[tower] = (num_layers, width)
        blocks: dict[str, list[towers.Block]] = {"image": [], "text": []}
        blocks |= self._blocks(sizes, compose_per_layer)
        return functional_call(
            runner, stem, (image, text, blocks["image"], blocks["text"], tap_image, tap_text, patches, packing, checkpoint)
        )

    def _runner(self, image_width: int | None, text_width: int | None) -> tuple[_StemRunner, dict[str, tuple[int, ...]]]:
        key = (image_width, text_width)
        if key not in self._runners[0]:
            config, rank = self.structure.sized(image_width=image_width, text_width=text_width), self.structure.embedding_rank
            with torch.device("meta"):
                clip = towers.empty_stem(config)
                if rank is not None:
                    clip.token_embedding = FactorisedEmbedding(towers.vocab_size(config), rank, towers.width(config, "text"))
                self._runners[0][key] = _StemRunner(clip), factorised_shapes(stem_shapes(config), rank)
        runner, shapes = self._runners[0][key]
        return runner.train(self.training), shapes

    def _blocks(self, sizes: Sizes, per_layer: bool) -> dict[str, list[towers.Block]]:
        device = self._get("multimodal").device.type
        # Under autocast the matrices would be rounded to its dtype at each use: they are so once, while they are written.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        found: dict[str, list[towers.Block]] = {}
        compiled = self.runs_compiled()
        with torch.autocast(device, enabled=False):
            if per_layer and self.structure.basis == "knots":
                lazy = compose_lazily(self.structure, self._get, sizes, dtype=dtype)
                for tower, layers in lazy.items():
                    found[tower] = [functools.partial(_make_and_run, self._form(tower, sizes[tower][1]), compiled, make) for make in layers]
                return found
            for tower, composed in compose_layers(self.structure, self._get, sizes, dtype=dtype).items():
                found[tower] = [functools.partial(_run, self._form(tower, sizes[tower][1]), compiled, tensors) for tensors in composed]
        return found

    def _form(self, tower: str, width: int | None) -> towers.BlockForm:
        key = (tower, width)
        if key not in self._forms:
            self._forms[key] = towers.BlockForm.of(self.structure.sized(**{f"{tower}_width": width}), tower)
        return self._forms[key]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind: blocks, coefficients, vectors, maps, stem_matrices, stem_other; kinds without any are left out."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.numel():
                continue
            if name.startswith(_parameter_name(STEM)):
                kind = "stem_matrices" if parameter.ndim >= 2 and "embedding" not in name else "stem_other"
            elif name == "multimodal" or name.startswith("unimodal"):
                kind = "blocks"
            else:
                kind = "maps" if "_map_" in name else name.split("_")[0]
            groups.setdefault(kind, []).append(parameter)
        return groups


def learngene_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An AuxiliaryCLIP's state dict under the learngene's names."""
    return {name.replace("/", "."): tensor for name, tensor in state.items()}


def _parameter_name(name: str) -> str:
    return name.replace(".", "/")


class _StemRunner(nn.Module):
    """A CLIP without blocks, whose forward runs both towers with the blocks that it is given."""

    def __init__(self, clip: towers.CLIP) -> None:
        super().__init__()
        self.clip = clip

    def forward(
        self,
        image: Tensor | None,
        text: Tensor | None,
        image_blocks: Sequence[towers.Block],
        text_blocks: Sequence[towers.Block],
        tap_image: Sequence[int],
        tap_text: Sequence[int],
        patches: Tensor | None,
        packing: towers.Packing | None,
        checkpoint: bool,
    ) -> dict[str, Any]:
        outputs = towers.logits_outputs(self.clip)
        if image is not None:
            outputs["image_features"], outputs["image_hidden"] = towers.run_image_tower(
                self.clip.visual, image_blocks, image, tap_image, patches=patches, checkpoint=checkpoint
            )
        if text is not None:
            outputs["text_features"], outputs["text_hidden"] = towers.run_text_tower(
                self.clip, text_blocks, text, tap_text, packing=packing, checkpoint=checkpoint
            )
        return outputs


def _run(form: towers.BlockForm, compiled: bool, tensors: dict[str, Tensor], hidden: Tensor, *rest: Any) -> Tensor:
    return towers.run_block(hidden, tensors, form, *rest, compiled=compiled)


def _make_and_run(form: towers.BlockForm, compiled: bool, make: Callable[[], dict[str, Tensor]], hidden: Tensor, *rest: Any) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        tensors = make()
    return towers.run_block(hidden, tensors, form, *rest, compiled=compiled)


def _fill_block(layout: BlockLayout, block_P: Tensor, depth: int, generator: torch.Generator) -> None:
    """Random matrices with the standard deviations of open_clip's TextTransformer.init_parameters for a model of `depth` layers."""
    for entry in layout.matrices:
        width = min(entry.shape)
        std = width**-0.5 if not entry.name.startswith("mlp.c_fc") else (2 * width) ** -0.5
        if entry.name in RESIDUAL_OUTPUTS:
            std *= (2 * depth) ** -0.5
        entry.view(block_P).normal_(0.0, std, generator=generator)


def _fill_vectors(structure: Structure, layout: BlockLayout, vectors_RV: Tensor) -> None:
    """LayerNorm weights of one and biases of zero at every depth: in the linear basis the constant row has them."""
    vectors_RV.zero_()
    rows_RV = vectors_RV[:1] if structure.basis == "linear" else vectors_RV
    for entry in layout.vectors:
        if entry.name in ("ln_1.weight", "ln_2.weight"):
            entry.view(rows_RV).fill_(1.0)


def _fill_coefficients(coefficients_RGK: Tensor, num_multimodal: int, generator: torch.Generator) -> None:
    num_knots, _, num_blocks = coefficients_RGK.shape
    for index in range(num_blocks):
        for knot in range(num_knots):
            centred = 2 * knot / (num_knots - 1) - 1
            degree = 0 if index < num_multimodal else index - num_multimodal + 1
            coefficients_RGK[knot, :, index] = legendre(degree, centred)
    coefficients_RGK += COEFFICIENT_NOISE * torch.randn(coefficients_RGK.shape, generator=generator)

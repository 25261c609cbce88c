"""The auxiliary CLIP: its layers are weighted sums of the learngene's blocks. It is what extraction trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.blocks import BlockLayout
from mmlg_scale.learngene.mixing import compose_layers

TOWERS = ("image", "text")
# Matrices that write into the residual stream: scaled down with depth at the start, as in CLIP and GPT-2.
RESIDUAL_OUTPUTS = ("attn.out_proj.weight", "mlp.c_proj.weight")
COEFFICIENT_NOISE = 0.05


class AuxiliaryCLIP(nn.Module):
    """Owns every tensor of the learngene and composes the layers inside its own forward.

    One module owns all parameters because ZeRO-3 gathers them only in the forward of their owner.

    Parameters:
        multimodal: [K_M, P], blocks shared by both towers.
        unimodal_image, unimodal_text: [K_U, P], blocks of one tower.
        coefficients_image, coefficients_text: [R, G, K_M + K_U] for the G matrices of a block, multimodal blocks first.
        vectors_image, vectors_text: [R, V], LayerNorms and biases at each knot.
        stem: an open_clip CLIP without blocks.
    """

    unimodal_image: nn.Parameter
    unimodal_text: nn.Parameter
    coefficients_image: nn.Parameter
    coefficients_text: nn.Parameter
    vectors_image: nn.Parameter
    vectors_text: nn.Parameter

    def __init__(
        self,
        config: dict[str, Any],
        stem: towers.CLIP,
        *,
        num_multimodal: int,
        num_unimodal: int,
        num_knots: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_multimodal, self.num_unimodal, self.num_knots = num_multimodal, num_unimodal, num_knots
        # Kept out of the module registry: functional_call on a registered module fails under ZeRO-3.
        self._templates = {tower: [towers.block_template(config, tower)] for tower in TOWERS}
        self.layout = common_layout(config)
        size, vectors, matrices = self.layout.matrix_size, self.layout.vector_size, len(self.layout.matrices)
        self.multimodal = nn.Parameter(torch.empty(num_multimodal, size))
        for tower in TOWERS:
            setattr(self, f"unimodal_{tower}", nn.Parameter(torch.empty(num_unimodal, size)))
            setattr(self, f"coefficients_{tower}", nn.Parameter(torch.empty(num_knots, matrices, num_multimodal + num_unimodal)))
            setattr(self, f"vectors_{tower}", nn.Parameter(torch.empty(num_knots, vectors)))
        self.stem = stem

    @classmethod
    def empty(cls, config: dict[str, Any], *, num_multimodal: int, num_unimodal: int, num_knots: int) -> AuxiliaryCLIP:
        """On the meta device: names and shapes, no memory."""
        with torch.device("meta"):
            stem = towers.empty_stem(config)
            return cls(config, stem, num_multimodal=num_multimodal, num_unimodal=num_unimodal, num_knots=num_knots)

    @classmethod
    def from_ancestor(
        cls,
        ancestor_state: Mapping[str, Tensor],
        config: dict[str, Any],
        *,
        num_multimodal: int,
        num_unimodal: int,
        num_knots: int,
        seed: int,
    ) -> AuxiliaryCLIP:
        """Stems copied from the ancestor; blocks random like a fresh block; coefficients centred.

        A multimodal block's coefficient starts at 1 at every depth, the j-th unimodal block's at the Legendre polynomial of degree j in
        2t - 1 (the first: 2t - 1 itself), each with noise of 0.05, so that no two blocks start alike.
        """
        stem = towers.empty_stem(config)
        stem.load_state_dict({name: tensor.clone() for name, tensor in towers.split_state(ancestor_state)[0].items()})
        model = cls(config, stem, num_multimodal=num_multimodal, num_unimodal=num_unimodal, num_knots=num_knots)
        generator = torch.Generator().manual_seed(seed)
        depth = max(towers.num_layers(config, tower) for tower in TOWERS)
        with torch.no_grad():
            for blocks_KP in (model.multimodal, model.unimodal_image, model.unimodal_text):
                for block_P in blocks_KP:
                    _fill_block(model.layout, block_P, depth, generator)
            for tower in TOWERS:
                _fill_coefficients(getattr(model, f"coefficients_{tower}"), num_multimodal, generator)
                vectors_RV = getattr(model, f"vectors_{tower}")
                for entry in model.layout.vectors:
                    is_scale = entry.name in ("ln_1.weight", "ln_2.weight")
                    entry.view(vectors_RV).fill_(1.0 if is_scale else 0.0)
        return model

    def layers(self, tower: str, num_layers: int) -> list[dict[str, Tensor]]:
        """The named tensors of each layer of a tower of `num_layers`; differentiable."""
        blocks_KP = torch.cat([self.multimodal, getattr(self, f"unimodal_{tower}")])
        coefficients, vectors = getattr(self, f"coefficients_{tower}"), getattr(self, f"vectors_{tower}")
        return compose_layers(self.layout, blocks_KP, coefficients, vectors, num_layers)

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        image_layers: int | None = None,
        text_layers: int | None = None,
        tap_image: Sequence[int] = (),
        tap_text: Sequence[int] = (),
    ) -> dict[str, Any]:
        """Features (not normalised), hidden states after the tapped layers, and the logit multiplier, at the given depths."""
        outputs: dict[str, Any] = {"logit_scale": towers.logit_multiplier(self.stem.logit_scale)}
        if image is not None:
            assert image_layers is not None
            outputs["image_features"], outputs["image_hidden"] = towers.run_image_tower(
                self.stem.visual, self._blocks("image", image_layers), image, tap_image
            )
        if text is not None:
            assert text_layers is not None
            outputs["text_features"], outputs["text_hidden"] = towers.run_text_tower(
                self.stem, self._blocks("text", text_layers), text, tap_text
            )
        return outputs

    def _blocks(self, tower: str, num_layers: int) -> list[towers.Block]:
        template = self._templates[tower][0]
        return [functools.partial(_call_block, template, tensors) for tensors in self.layers(tower, num_layers)]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by kind: blocks, coefficients, vectors, stem_matrices, stem_other."""
        groups: dict[str, list[nn.Parameter]] = {
            "blocks": [self.multimodal, self.unimodal_image, self.unimodal_text],
            "coefficients": [self.coefficients_image, self.coefficients_text],
            "vectors": [self.vectors_image, self.vectors_text],
            "stem_matrices": [],
            "stem_other": [],
        }
        for name, parameter in self.stem.named_parameters():
            is_matrix = parameter.ndim >= 2 and "embedding" not in name
            groups["stem_matrices" if is_matrix else "stem_other"].append(parameter)
        groups["blocks"] = [parameter for parameter in groups["blocks"] if parameter.numel()]
        return groups


def common_layout(config: dict[str, Any]) -> BlockLayout:
    """The block layout that both towers share.

    Raises:
        UserError: the towers' blocks differ in shape.
    """
    image, text = (BlockLayout.of(towers.block_template(config, tower)) for tower in TOWERS)
    if image != text:
        widths = [towers.width(config, tower) for tower in TOWERS]
        raise UserError(
            f"recipe key model: image and text blocks differ (widths {widths[0]} and {widths[1]}). Towers of equal width are carried."
        )
    return image


def _call_block(template: nn.Module, tensors: dict[str, Tensor], hidden: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return functional_call(template, tensors, (hidden,), {"attn_mask": attn_mask})


def _fill_block(layout: BlockLayout, block_P: Tensor, depth: int, generator: torch.Generator) -> None:
    """Random matrices with the standard deviations of open_clip's TextTransformer.init_parameters for a model of `depth` layers."""
    for entry in layout.matrices:
        width = min(entry.shape)
        std = width**-0.5 if not entry.name.startswith("mlp.c_fc") else (2 * width) ** -0.5
        if entry.name in RESIDUAL_OUTPUTS:
            std *= (2 * depth) ** -0.5
        entry.view(block_P).normal_(0.0, std, generator=generator)


def _fill_coefficients(coefficients_RGK: Tensor, num_multimodal: int, generator: torch.Generator) -> None:
    num_knots, _, num_blocks = coefficients_RGK.shape
    for index in range(num_blocks):
        for knot in range(num_knots):
            centred = 2 * knot / (num_knots - 1) - 1
            degree = 0 if index < num_multimodal else index - num_multimodal + 1
            coefficients_RGK[knot, :, index] = _legendre(degree, centred)
    coefficients_RGK += COEFFICIENT_NOISE * torch.randn(coefficients_RGK.shape, generator=generator)


def _legendre(degree: int, x: float) -> float:
    """Legendre polynomial by Bonnet's recursion."""
    values = [1.0, x]
    for n in range(1, degree):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return values[degree]

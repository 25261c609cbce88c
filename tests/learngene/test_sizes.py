"""Unequal towers, narrower descendants and the fixed bases, against their formulas and against open_clip's own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmlg_scale import load_learngene, towers
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.baselines import even_layers, initialise
from mmlg_scale.learngene.blocks import narrow
from mmlg_scale.learngene.compose import compose_layers
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.learngene.mixing import fixed_weights
from mmlg_scale.learngene.structure import Structure
from tests.training.tiny import ANY_SIZE

# An image tower of 3 heads and a text tower of 2, all of dimension 8.
UNEQUAL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 24, "head_width": 8, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2},
}
OTHER_HEADS = {**UNEQUAL, "text_cfg": {**UNEQUAL["text_cfg"], "heads": 4}}  # type: ignore[dict-item]


def randomised(structure: Structure, seed: int = 0) -> AuxiliaryCLIP:
    """Every tensor random, so that a wrong place would show."""
    state = towers.build_clip(structure.config, seed=1).state_dict()
    model = AuxiliaryCLIP.from_ancestor(state, structure, seed=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def gene_of(model: AuxiliaryCLIP) -> Learngene:
    return Learngene.from_auxiliary(
        model.structure, model.state_dict(), spec=towers.ModelSpec(model.structure.config), extraction={}, trained=ANY_SIZE
    )


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    texts = torch.randint(3, 19, (4, 8), generator=generator)
    texts[:, 5] = 19
    return torch.randn(4, 3, 16, 16, generator=generator), texts


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def heads_by_hand(weight: Tensor, width: int) -> Tensor:
    """The rows of `width` leading channels of each of q, k and v, written out."""
    full = weight.shape[0] // 3
    return torch.cat([weight[part * full : part * full + width] for part in range(3)])


def test_narrow_takes_leading_heads_of_queries_keys_and_values() -> None:
    weight = torch.arange(24 * 8.0).reshape(24, 8)
    assert torch.equal(narrow("attn.in_proj_weight", weight, (12, 4)), heads_by_hand(weight, 4)[:, :4])
    stacked = torch.stack([weight, -weight])
    assert torch.equal(narrow("attn.in_proj_weight", stacked, (12, 4))[1], -heads_by_hand(weight, 4)[:, :4])
    assert torch.equal(narrow("attn.in_proj_bias", weight[:, 0], (12,)), heads_by_hand(weight, 4)[:, 0])
    assert torch.equal(narrow("mlp.c_fc.weight", weight, (6, 5)), weight[:6, :5])


def test_the_narrower_tower_takes_slices_of_the_multimodal_block() -> None:
    """W = a_M * slice(M) + a_U * U in fp64, written out for each of the four matrices."""
    model = randomised(Structure(UNEQUAL, num_knots=2))
    structure, get = model.structure, model._get
    wide, own = structure.layout("image"), structure.layout("text")
    found = compose_layers(structure, get, {"text": (2, None)})["text"]
    shared = {e.name: e.view(get("multimodal"))[0].double() for e in wide.matrices}
    unimodal = {e.name: e.view(get("unimodal_text"))[0].double() for e in own.matrices}
    sliced = {
        "attn.in_proj_weight": heads_by_hand(shared["attn.in_proj_weight"], 16)[:, :16],
        "attn.out_proj.weight": shared["attn.out_proj.weight"][:16, :16],
        "mlp.c_fc.weight": shared["mlp.c_fc.weight"][:64, :16],
        "mlp.c_proj.weight": shared["mlp.c_proj.weight"][:16, :64],
    }
    for layer in (0, 1):  # with two knots, layers 0 and 1 of two lie on them
        for index, entry in enumerate(own.matrices):
            a = get("coefficients_text")[layer, index].double()
            expected = a[0] * sliced[entry.name] + a[1] * unimodal[entry.name]
            assert torch.allclose(found[layer][entry.name].double(), expected, rtol=1e-5, atol=1e-6)


def test_learned_maps_start_as_slices_and_follow_their_formula() -> None:
    """E_out M E_in^T; at the start the maps are leading rows of the identity."""
    structure = Structure(OTHER_HEADS, num_unimodal=0, num_knots=2, width_map="learned")
    state = towers.build_clip(structure.config, seed=1).state_dict()
    model = AuxiliaryCLIP.from_ancestor(state, structure, seed=2)
    shared = {e.name: e.view(model._get("multimodal"))[0] for e in structure.layout("image").matrices}
    a = model._get("coefficients_text")
    first = compose_layers(structure, model._get, {"text": (2, None)})["text"][0]
    assert torch.allclose(first["mlp.c_proj.weight"], a[0, 3, 0] * shared["mlp.c_proj.weight"][:16, :64], atol=1e-6)
    assert torch.allclose(first["attn.in_proj_weight"], a[0, 0, 0] * heads_by_hand(shared["attn.in_proj_weight"], 16)[:, :16], atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for kind in ("residual_map_text", "head_map_text"):
            model._get(kind).copy_(torch.randn(16, 24, generator=generator))
    residual, heads = model._get("residual_map_text"), model._get("head_map_text")
    first = compose_layers(structure, model._get, {"text": (2, None)})["text"][0]
    q, k, v = (heads @ part @ residual.T for part in shared["attn.in_proj_weight"].split(24))
    assert_close(first["attn.in_proj_weight"], a[0, 0, 0] * torch.cat([q, k, v]))
    assert_close(first["attn.out_proj.weight"], a[0, 1, 0] * (residual @ shared["attn.out_proj.weight"] @ heads.T))
    assert_close(first["mlp.c_fc.weight"], a[0, 2, 0] * (shared["mlp.c_fc.weight"] @ residual.T)[:64])
    assert_close(first["mlp.c_proj.weight"], a[0, 3, 0] * (residual @ shared["mlp.c_proj.weight"])[:, :64])


SIZES = st.fixed_dictionaries(
    {"image_layers": st.integers(1, 5), "text_layers": st.integers(1, 5)},
    optional={"image_width": st.sampled_from([8, 16, 24]), "text_width": st.sampled_from([8, 16])},
)
STRUCTURES = st.one_of(
    st.builds(
        Structure,
        st.just(UNEQUAL),
        num_multimodal=st.integers(0, 2),
        num_unimodal=st.integers(1, 2),
        num_knots=st.integers(2, 5),
        basis=st.sampled_from(["knots", "step"]),
        width_map=st.sampled_from(["slice", "learned"]),
        embedding_rank=st.sampled_from([None, 1, 5, 16]),
    ),
    st.builds(
        Structure,
        st.just(UNEQUAL),
        num_multimodal=st.just(1),
        num_unimodal=st.just(1),
        basis=st.just("linear"),
        convention=st.sampled_from(["inclusive", "paper"]),
    ),
)


@given(structure=STRUCTURES, sizes=SIZES, seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_descendants_equal_the_auxiliary_model(structure: Structure, sizes: dict[str, int], seed: int) -> None:
    """Any blocks, basis, depths and widths: written to bytes, read, descended, loaded by open_clip's class; equal features."""
    model = randomised(structure, seed)
    descendant = gene_of(model).descend(**sizes)  # type: ignore[arg-type]
    clip = towers.build_clip(descendant.config, seed=0).eval()
    clip.load_state_dict(descendant.state, strict=True)
    images, texts = inputs()
    with torch.no_grad():
        expected = model(images, texts, **sizes)
        found = clip.encode_image(images), clip.encode_text(texts)
    for features, tower in zip(found, ("image", "text"), strict=True):
        assert torch.isfinite(features).all()
        assert_close(features, expected[f"{tower}_features"])
    count = sum(tensor.numel() for tensor in gene_of(model).tensors.values())
    assert count == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("modality", ["both", "image", "text"])
def test_narrow_descendants_on_disk(modality: str, tmp_path: Path) -> None:
    model = randomised(Structure(UNEQUAL))
    gene_of(model).save(tmp_path / "gene.safetensors")
    sizes = {"image_layers": 4, "image_width": 16, "text_layers": 3, "text_width": 8}
    wanted = {key: value for key, value in sizes.items() if modality in ("both", key.split("_")[0])}
    load_learngene(tmp_path / "gene.safetensors").descend(**wanted, modality=modality).export(tmp_path / "m")  # type: ignore[arg-type]
    images, texts = inputs()
    with torch.no_grad():
        expected = model(images, texts, **sizes)
        if modality == "both":
            clip = towers.open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval()
            assert_close(clip.encode_image(images), expected["image_features"])
            assert_close(clip.encode_text(texts), expected["text_features"])
        else:
            tower = towers.load_tower(tmp_path / "m").eval()
            assert_close(tower(images if modality == "image" else texts), expected[f"{modality}_features"])


def test_linear_basis_is_tleg_bit_for_bit() -> None:
    """theta_l = A + (l / L) B for l = 0 ... L - 1 in its paper's convention, l / (L - 1) in ours."""
    for convention, divisor in (("paper", 5), ("inclusive", 4)):
        structure = Structure(UNEQUAL, num_multimodal=0, num_unimodal=2, basis="linear", convention=convention)
        model = randomised(structure)
        layout, blocks, vectors = structure.layout("image"), model._get("unimodal_image"), model._get("vectors_image")
        for layer, tensors in enumerate(compose_layers(structure, model._get, {"image": (5, None)})["image"]):
            t = layer / divisor
            for entry in layout.matrices:
                assert torch.equal(tensors[entry.name], entry.view(blocks[0]) + t * entry.view(blocks[1]))
            for entry in layout.vectors:
                assert torch.equal(tensors[entry.name], entry.view(vectors[0]) + t * entry.view(vectors[1]))


def test_step_basis_is_stage_wise_sharing_bit_for_bit() -> None:
    structure = Structure(UNEQUAL, num_multimodal=0, num_unimodal=3, basis="step")
    model = randomised(structure)
    layout, blocks = structure.layout("text"), model._get("unimodal_text")
    stages = [0, 0, 0, 1, 1, 2, 2]
    for stage, tensors in zip(stages, compose_layers(structure, model._get, {"text": (7, None)})["text"], strict=True):
        for entry in layout.matrices:
            assert torch.equal(tensors[entry.name], entry.view(blocks[stage]))
    assert fixed_weights("step", 2, 3) == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_gradients_reach_every_tensor() -> None:
    """fp64 gradients of composing at a narrow size, learned maps among them, against finite differences."""
    structure = Structure(OTHER_HEADS, num_knots=2, width_map="learned")
    model = randomised(structure).double()
    names = [name for name in structure.block_shapes() if not name.endswith("_image")]
    generator = torch.Generator().manual_seed(0)
    probes = {name: torch.randn(structure.block_shapes()[name], generator=generator, dtype=torch.float64) for name in names}
    direction = {}

    def value(step: float) -> Tensor:
        layers = compose_layers(structure, lambda name: model._get(name) + step * probes.get(name, 0), {"text": (3, 8)})["text"]
        return sum((tensor.sin().sum() for layer in layers for tensor in layer.values()), start=torch.zeros((), dtype=torch.float64))

    value(0.0).backward()
    for name in names:
        grad = model._get(name).grad
        assert grad is not None
        assert grad.norm() > 0
        direction[name] = float((grad * probes[name]).sum())
    with torch.no_grad():
        difference = float(value(1e-6) - value(-1e-6)) / 2e-6
    assert sum(direction.values()) == pytest.approx(difference, rel=1e-6)


def test_even_picking_at_a_smaller_width() -> None:
    config = towers.model_config(UNEQUAL)
    ancestor = towers.build_clip(config, seed=4).state_dict()
    sizes = {"image_layers": 2, "text_layers": 1, "image_width": 16, "text_width": 8}
    state = initialise("even", config=config, sizes=sizes, ancestor_state=ancestor, learngene=None, seed=0)
    towers.build_clip(towers.with_sizes(config, **sizes), seed=9).load_state_dict(state)
    last = f"visual.transformer.resblocks.{even_layers(3, 2)[1]}.attn.in_proj_weight"
    assert torch.equal(state["visual.transformer.resblocks.1.attn.in_proj_weight"], heads_by_hand(ancestor[last], 16)[:, :16])
    assert torch.equal(state["visual.proj"], ancestor["visual.proj"][:16])


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (OTHER_HEADS, {}, "width_map: slice needs one head dimension, the image tower has 8, the text tower 4"),
        (UNEQUAL, {"basis": "linear", "num_unimodal": 2}, "linear mixes two blocks per tower, the recipe has 3"),
        (UNEQUAL, {"embedding_rank": 17}, "embedding_rank: 17 is not a whole number from 1 to 16, the lesser of the vocabulary and"),
        (UNEQUAL, {"basis": "cubic"}, "'cubic' is unknown. Use one of: knots, linear, step"),
        (UNEQUAL, {"num_multimodal": 0, "num_unimodal": 0}, "has no blocks"),
        (
            {**UNEQUAL, "text_cfg": {**UNEQUAL["text_cfg"], "mlp_ratio": 8.0}},  # type: ignore[dict-item]
            {},
            "mlp.c_fc.weight of the text tower, .128, 16., does not fit into the wider tower",
        ),
    ],
)
def test_structures_that_cannot_be(config: dict[str, object], changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Structure(config, **changes)  # type: ignore[arg-type]


def test_widths_that_do_not_fit() -> None:
    gene = gene_of(randomised(Structure(UNEQUAL)))
    for width in (12, 32, 0):
        with pytest.raises(UserError, match=f"image width: {width} does not fit. Use a multiple of the head dimension 8, at most 24"):
            gene.descend(image_layers=2, text_layers=2, image_width=width)

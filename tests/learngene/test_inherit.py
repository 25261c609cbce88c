"""The start from the ancestor: relabelling is exact, and the fit finds blocks that are there."""

from __future__ import annotations

import pytest
import torch

from mmlg_scale import towers
from mmlg_scale.learngene import inherit as module
from mmlg_scale.learngene.auxiliary import COEFFICIENT_NOISE, AuxiliaryCLIP
from mmlg_scale.learngene.blocks import narrow
from mmlg_scale.learngene.inherit import _align_heads, _align_mlp, align, fit, inherit
from mmlg_scale.learngene.structure import TOWERS, Structure
from tests.training.tiny import CONFIG

EQUAL = towers.model_config(CONFIG)
WIDER = towers.model_config(CONFIG | {"vision_cfg": {**CONFIG["vision_cfg"], "width": 32, "layers": 5}})  # type: ignore[dict-item]


def layers_of(config: dict[str, object], tower: str, seed: int) -> list[dict[str, torch.Tensor]]:
    state = towers.build_clip(config, seed=seed).state_dict()
    generator = torch.Generator().manual_seed(seed)
    blocks = towers.split_state(state)[1][tower]
    return [{name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in block.items()} for block in blocks]


@pytest.mark.parametrize(("config", "tower", "num_heads"), [(EQUAL, "text", 2), (WIDER, "image", 4)])
def test_aligned_layers_compute_the_same(config: dict[str, object], tower: str, num_heads: int) -> None:
    layers = layers_of(config, tower, 1)
    before = [dict(layer) for layer in layers]
    align(layers, num_heads)
    block = towers.open_clip.transformer.ResidualAttentionBlock(towers.width(config, tower), num_heads).double()
    hidden = torch.randn(2, 6, towers.width(config, tower), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for old, new in zip(before, layers, strict=True):
        expected = torch.func.functional_call(block, old, (hidden,))
        torch.testing.assert_close(torch.func.functional_call(block, new, (hidden,)), expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(old["mlp.c_fc.weight"], new["mlp.c_fc.weight"]) or old is before[len(before) // 2]


def test_align_undoes_a_relabelling() -> None:
    """Layers that are one layer under other names come out equal."""
    (layer, *_) = layers_of(EQUAL, "text", 3)
    heads, width = 2, 16
    generator = torch.Generator().manual_seed(4)
    renamed = dict(layer)
    order = torch.randperm(4 * width, generator=generator)
    renamed["mlp.c_fc.weight"], renamed["mlp.c_fc.bias"] = layer["mlp.c_fc.weight"][order], layer["mlp.c_fc.bias"][order]
    renamed["mlp.c_proj.weight"] = layer["mlp.c_proj.weight"][:, order]
    rows = torch.arange(width).view(heads, -1).flip(0).flatten()  # heads change places
    renamed["attn.in_proj_weight"] = layer["attn.in_proj_weight"].view(3, width, width)[:, rows].reshape(3 * width, width)
    renamed["attn.in_proj_bias"] = layer["attn.in_proj_bias"].view(3, width)[:, rows].flatten()
    renamed["attn.out_proj.weight"] = layer["attn.out_proj.weight"][:, rows]
    pair = [renamed, dict(layer)]
    align(pair, heads)
    for name in layer:
        torch.testing.assert_close(pair[0][name], pair[1][name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("config", "tower", "num_heads"), [(EQUAL, "text", 2), (WIDER, "image", 4)])
def test_threads_and_an_early_end_change_no_bit(config: dict[str, object], tower: str, num_heads: int) -> None:
    """Against the four rounds written out, a layer after the other. MLPs settle: none is matched in every round."""
    expected, layers = layers_of(config, tower, 10), layers_of(config, tower, 10)
    reference = expected[len(expected) // 2]
    for _ in range(4):
        for layer in expected:
            _align_mlp(layer, reference)
            _align_heads(layer, reference, num_heads)
        reference = {name: torch.stack([layer[name] for layer in expected]).mean(0) for name in reference}
    matched = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_align_mlp", lambda layer, reference: matched.append(1) or _align_mlp(layer, reference))
        align(layers, num_heads)
    assert 2 * len(layers) <= len(matched) < 4 * len(layers)
    for one, other in zip(layers, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_fit_that_takes_long_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    structure, state = Structure(WIDER, num_knots=3), towers.build_clip(WIDER, seed=8).state_dict()
    inherit(structure, state)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    inherit(structure, state)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 * 4 + 1
    assert lines[0].startswith("aligning the image tower's layers of the ancestor, round 1 of 4, 0 s")
    assert lines[-1].startswith("fitted the blocks to the ancestor's layers, ")


def rebuilt(structure: Structure, tensors: dict[str, torch.Tensor], tower: str, num_layers: int) -> list[dict[str, torch.Tensor]]:
    """Layers out of fitted tensors, written out once more without `compose`; as many knots as layers, so nothing is interpolated."""
    assert structure.num_knots == num_layers
    found = []
    for layer in range(num_layers):
        made = {}
        wide_entries, own_entries = structure.layout(structure.wide).matrices, structure.layout(tower).matrices
        for index, (wide, own) in enumerate(zip(wide_entries, own_entries, strict=True)):
            shared = narrow(own.name, wide.view(tensors["multimodal"]), own.shape)
            blocks = torch.cat([shared, own.view(tensors[f"unimodal_{tower}"])])
            made[own.name] = torch.einsum("k,k...->...", tensors[f"coefficients_{tower}"][layer, index], blocks)
        found.append(made)
    return found


@pytest.mark.parametrize("config", [EQUAL, WIDER | {"vision_cfg": {**WIDER["vision_cfg"], "layers": 3}}], ids=["equal", "wider"])
def test_an_ancestor_made_of_blocks_is_found_again(config: dict[str, object]) -> None:
    """Every layer of the ancestor is a mixture of one multimodal and one unimodal block: the fit explains all of it."""
    structure = Structure(config, num_knots=3)
    generator = torch.Generator().manual_seed(5)
    truth = {
        "multimodal": torch.randn(1, structure.layout(structure.wide).matrix_size, generator=generator),
        **{f"unimodal_{tower}": torch.randn(1, structure.layout(tower).matrix_size, generator=generator) for tower in TOWERS},
        **{f"coefficients_{tower}": 1 + torch.rand(3, 4, 2, generator=generator) for tower in TOWERS},
    }
    for tower in TOWERS:  # unimodal blocks change sign with depth, as they start
        truth[f"coefficients_{tower}"][..., 1] = torch.tensor([-1.0, 0.3, 1.2])[:, None]
    made = {tower: rebuilt(structure, truth, tower, 3) for tower in TOWERS}
    vectors = towers.split_state(towers.build_clip(config, seed=6).state_dict())[1]
    layers = {tower: [{**vectors[tower][i], **made[tower][i]} for i in range(3)] for tower in TOWERS}
    found = fit(structure, {tower: [{name: t.double() for name, t in layer.items()} for layer in layers[tower]] for tower in TOWERS})
    for tower in TOWERS:
        for layer, expected in zip(rebuilt(structure, found, tower, 3), made[tower], strict=True):
            for name, tensor in layer.items():
                assert (tensor - expected[name]).norm() < 0.03 * expected[name].norm(), (tower, name)
    norms = [structure.layout(tower).flatten(layer)[0].norm() for tower in TOWERS for layer in layers[tower]]
    assert 0.3 < float(found["multimodal"].norm() / torch.stack(norms).mean()) < 3


@pytest.mark.parametrize(
    ("basis", "more"), [("linear", {"num_multimodal": 0, "num_unimodal": 2}), ("step", {"num_multimodal": 1, "num_unimodal": 2})]
)
def test_fixed_bases_are_fitted_too(basis: str, more: dict[str, int]) -> None:
    """TLEG of an ancestor whose layers are A + t B gives A and B; a stage's block is the mean of its layers."""
    structure = Structure(EQUAL, basis=basis, **more)
    state = towers.build_clip(EQUAL, seed=7).state_dict()
    stem, blocks = towers.split_state(state)
    if basis == "linear":
        for tower in TOWERS:
            first, last = blocks[tower][0], blocks[tower][2]
            blocks[tower][1] = {name: (first[name] + last[name]) / 2 for name in first}
    found = inherit(structure, towers.join_state(stem, blocks))
    for tower in TOWERS:
        values = found[f"vectors_{tower}"]
        layers = [structure.layout(tower).flatten(block)[1] for block in blocks[tower]]
        if basis == "step":
            torch.testing.assert_close(values.norm(dim=1), torch.stack(layers).norm(dim=1), rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(values[0].norm(), layers[0].norm(), rtol=1e-3, atol=1e-3)


def test_the_fitted_start_is_nearer_to_the_ancestor_than_a_random_one() -> None:
    structure = Structure(EQUAL, num_knots=3)
    state = towers.build_clip(EQUAL, seed=8).state_dict()
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    clip = towers.build_clip(EQUAL, seed=8)
    with torch.no_grad():
        expected = clip.encode_image(images)
        distance = {}
        for fitted in (inherit(structure, state), None):
            auxiliary = AuxiliaryCLIP.from_ancestor(state, structure, seed=1, fitted=fitted)
            distance[fitted is not None] = (auxiliary(images, image_layers=3)["image_features"] - expected).norm() / expected.norm()
    assert distance[True] < 0.7 * distance[False]
    assert COEFFICIENT_NOISE > 0


DEEP = {key: {**value, "layers": 6} if isinstance(value, dict) else value for key, value in CONFIG.items()}
MANY = [(1, 1), (3, 0), (0, 4), (2, 1), (2, 2), (4, 4), (8, 1), (6, 6)]


@pytest.mark.parametrize(("num_multimodal", "num_unimodal"), MANY)
@pytest.mark.parametrize("width", [16, 32])
def test_more_blocks_are_no_large_terms_that_cancel(
    width: int, num_multimodal: int, num_unimodal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coefficients stay near 1, at as small a distance from the layers as without a ridge; where it is not needed it changes no bit."""
    config = towers.model_config(DEEP | {"vision_cfg": {**DEEP["vision_cfg"], "width": width}})  # type: ignore[dict-item]
    structure = Structure(config, num_knots=6, num_multimodal=num_multimodal, num_unimodal=num_unimodal)
    layers = {tower: layers_of(config, tower, 10 + place) for place, tower in enumerate(TOWERS)}
    for tower in TOWERS:  # every layer has a part that changes slowly with depth, as a trained model's do
        for index in range(1, 6):
            for name, tensor in layers[tower][index].items():
                layers[tower][index][name] = 0.5 * tensor + 0.8 * layers[tower][index - 1][name]

    def fitted() -> tuple[dict[str, torch.Tensor], float, float]:
        found = fit(structure, layers)
        errors = [
            (tensor - layer[name]).square().sum() / layer[name].square().sum()
            for tower in TOWERS
            for made, layer in zip(rebuilt(structure, found, tower, 6), layers[tower], strict=True)
            for name, tensor in made.items()
        ]
        return found, max(float(found[f"coefficients_{tower}"].abs().max()) for tower in TOWERS), float(torch.stack(errors).mean().sqrt())

    found, largest, error = fitted()
    monkeypatch.setattr(module, "RIDGE", 0.0)
    plain, without, least = fitted()
    assert largest < 5
    assert error < least + 0.05
    if num_multimodal > 1 and num_unimodal:
        assert largest < min(2, without)
    else:
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    if (num_multimodal, num_unimodal) == (4, 4):
        assert without > 10, "nothing cancels: the comparison would show nothing"

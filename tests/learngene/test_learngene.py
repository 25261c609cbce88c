"""The weighted sum against its formula, and descendants on disk against the auxiliary model at the same size."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmlg_scale import load_learngene, towers
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP, learngene_tensors
from mmlg_scale.learngene.baselines import even_layers, initialise
from mmlg_scale.learngene.compose import compose_layers
from mmlg_scale.learngene.file import Learngene, RangeWarning
from mmlg_scale.learngene.mixing import knot_weights, relative_depth
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.training.stages import TowerStage
from tests.training.tiny import ANY_SIZE, CONFIG, batch


@pytest.fixture(scope="module")
def auxiliary() -> AuxiliaryCLIP:
    """Every tensor random, also those that start at zero or one: a wrong place would show."""
    config = towers.model_config(CONFIG)
    model = AuxiliaryCLIP.from_ancestor(
        towers.build_clip(config, seed=1).state_dict(), Structure(config, num_multimodal=2, num_unimodal=2, num_knots=5), seed=2
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "stem" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def learngene(auxiliary: AuxiliaryCLIP) -> Learngene:
    return Learngene.from_auxiliary(
        auxiliary.structure,
        auxiliary.state_dict(),
        spec=towers.ModelSpec(auxiliary.structure.config),
        extraction={"steps": 1},
        trained=ANY_SIZE,
    )


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_layers_follow_the_formula(auxiliary: AuxiliaryCLIP, tower: str, num_layers: int) -> None:
    """W[l, g] = sum over blocks of a[g, k](t) B[k, g], in fp64 loops with the interpolation written out."""
    blocks = torch.cat([auxiliary.multimodal, getattr(auxiliary, f"unimodal_{tower}")]).double()
    coefficients, vectors = (getattr(auxiliary, f"{kind}_{tower}").double() for kind in ("coefficients", "vectors"))
    knots = torch.linspace(0, 1, auxiliary.structure.num_knots, dtype=torch.float64)
    layout = auxiliary.structure.layout(tower)

    def at(values: Tensor, t: float) -> Tensor:
        upper = int(torch.searchsorted(knots, torch.tensor(t, dtype=torch.float64), right=True).clamp(1, len(knots) - 1))
        share = (t - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
        return (1 - share) * values[upper - 1] + share * values[upper]

    for layer, tensors in enumerate(compose_layers(auxiliary.structure, auxiliary._get, {tower: (num_layers, None)})[tower]):
        t = 0.5 if num_layers == 1 else layer / (num_layers - 1)
        for index, entry in enumerate(layout.matrices):
            expected = torch.zeros(entry.shape, dtype=torch.float64)
            for k in range(len(blocks)):
                expected += at(coefficients, t)[index, k] * entry.view(blocks[k])
            assert torch.allclose(tensors[entry.name].double(), expected, rtol=1e-5, atol=1e-6)
        for entry in layout.vectors:
            assert torch.allclose(tensors[entry.name].double(), entry.view(at(vectors, t)), rtol=1e-5, atol=1e-6)


def test_knots_are_hit_exactly() -> None:
    assert torch.equal(knot_weights(5, 5), torch.eye(5, dtype=torch.float64))
    assert relative_depth(0, 1) == 0.5
    assert torch.equal(knot_weights(1, 3), torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))


def test_start_is_centred() -> None:
    config = towers.model_config(CONFIG)
    model = AuxiliaryCLIP.from_ancestor(
        towers.build_clip(config, seed=1).state_dict(), Structure(config, num_multimodal=1, num_unimodal=2, num_knots=9), seed=5
    )
    t = torch.linspace(0, 1, 9)
    mean = model.coefficients_image.detach().mean(dim=1)
    expected = torch.stack([torch.ones(9), 2 * t - 1, (3 * (2 * t - 1) ** 2 - 1) / 2], dim=1)
    assert (mean - expected).abs().max() < 0.12  # noise of 0.05, averaged over four matrices
    stem = {name: tensor for name, tensor in towers.build_clip(config, seed=1).state_dict().items() if "resblocks" not in name}
    found = learngene_tensors(model.state_dict())
    assert all(torch.equal(found[f"stem.{name}"], tensor) for name, tensor in stem.items())


def features_of(clip: torch.nn.Module) -> tuple[Tensor, Tensor]:
    images, texts = batch(0)
    with torch.no_grad():
        return clip.encode_image(images), clip.encode_text(texts)  # type: ignore[operator]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("image_layers", "text_layers"), [(1, 1), (2, 2), (3, 3), (5, 5), (9, 9), (2, 6), (4, 1)])
def test_descendant_on_disk_equals_auxiliary_model(
    learngene: Learngene, auxiliary: AuxiliaryCLIP, image_layers: int, text_layers: int, tmp_path: Path
) -> None:
    """Written, loaded by open_clip's own factory, and compared in features; depths beyond the ancestor's three too."""
    learngene.save(tmp_path / "learngene.safetensors")
    loaded = load_learngene(tmp_path / "learngene.safetensors")
    loaded.descend(image_layers=image_layers, text_layers=text_layers).export(str(tmp_path / "model"))
    clip, _, preprocess = towers.open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    images, texts = batch(0)
    with torch.no_grad():
        expected = auxiliary(images, texts, image_layers=image_layers, text_layers=text_layers)
    image_features, text_features = features_of(clip.eval())
    assert_close(image_features, expected["image_features"])
    assert_close(text_features, expected["text_features"])
    assert clip.logit_scale.shape == ()
    assert torch.allclose(clip.logit_scale.exp(), expected["logit_scale"])
    size = [transform.size for transform in preprocess.transforms if hasattr(transform, "size")]
    assert size
    assert all(value in (16, (16, 16), [16, 16]) for value in size)


def test_single_towers_load_strictly_and_agree(learngene: Learngene, tmp_path: Path) -> None:
    both = learngene.descend(image_layers=2, text_layers=3)
    both.export(tmp_path / "both")
    clip = towers.open_clip.create_model(f"local-dir:{tmp_path / 'both'}").eval()
    images, texts = batch(0)
    for modality, inputs, expected in (("image", images, clip.encode_image), ("text", texts, clip.encode_text)):
        learngene.descend(image_layers=2, text_layers=3, modality=modality).export(tmp_path / modality)
        tower = towers.load_tower(tmp_path / modality).eval()
        with torch.no_grad():
            assert torch.equal(tower(inputs), expected(inputs))
    assert not any("logit_scale" in name for name in load_file(tmp_path / "image" / "open_clip_tower.safetensors"))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_single_tower_is_evaluated_with_the_ancestors_other_one(learngene: Learngene, modality: str) -> None:
    """And with the ancestor's scale, whichever tower it is."""
    config = learngene.spec.config
    ancestor = towers.build_clip(config, seed=5)
    with torch.no_grad():
        ancestor.logit_scale.fill_(1.25)
    both, images_texts = learngene.descend(image_layers=2, text_layers=3), batch(0)
    own = towers.build_clip(both.spec.config, seed=0)
    own.load_state_dict(dict(both.state))
    expected = {"image": ancestor, "text": ancestor} | {modality: own}
    single = learngene.descend(**{f"{modality}_layers": 2 if modality == "image" else 3}, modality=modality)
    stage = TowerStage(single, towers.Bundle(learngene.spec, ancestor.state_dict()), torch.device("cpu"))
    with torch.no_grad():
        found = stage.model(*images_texts)
        assert_close(found["image_features"], expected["image"].encode_image(images_texts[0]))
        assert_close(found["text_features"], expected["text"].encode_text(images_texts[1]))
    assert float(found["logit_scale"]) == pytest.approx(math.exp(1.25))


def test_saved_and_loaded_gives_the_same_bytes(learngene: Learngene, tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    learngene.save(first)
    load_learngene(first).save(second)
    assert first.read_bytes() == second.read_bytes()


def test_counts_every_parameter(learngene: Learngene) -> None:
    """By hand, width 16: a block's matrices are 12 * 16^2, its vectors 13 * 16; 2 + 2 + 2 blocks, 5 knots."""
    block, vectors = 12 * 16**2, 13 * 16
    blocks = 6 * block + 2 * 5 * (4 * 4) + 2 * 5 * vectors
    image_stem = 3 * 8 * 8 * 16 + 16 + 5 * 16 + 4 * 16 + 16 * 16
    text_stem = 20 * 16 + 8 * 16 + 2 * 16 + 16 * 16
    assert learngene.block_params == blocks
    assert learngene.stem_params == image_stem + text_stem + 1
    assert learngene.num_params == blocks + image_stem + text_stem + 1


def test_even_picking() -> None:
    assert even_layers(8, 8) == list(range(8))
    assert even_layers(8, 2) == [0, 7]
    assert even_layers(8, 4) == [0, 2, 5, 7]
    assert even_layers(8, 1) == [4]
    config = towers.with_sizes(towers.model_config(CONFIG), image_layers=5, text_layers=5)
    ancestor = towers.build_clip(config, seed=4).state_dict()
    sizes = {"image_layers": 3, "text_layers": 2}
    state = initialise("even", config=config, sizes=sizes, ancestor_state=ancestor, learngene=None, seed=0)
    clip = towers.build_clip(towers.with_sizes(config, image_layers=3, text_layers=2), seed=9)
    clip.load_state_dict(state)
    assert torch.equal(clip.visual.transformer.resblocks[1].mlp.c_fc.weight, ancestor["visual.transformer.resblocks.2.mlp.c_fc.weight"])
    assert torch.equal(clip.transformer.resblocks[1].attn.in_proj_weight, ancestor["transformer.resblocks.4.attn.in_proj_weight"])
    assert torch.equal(clip.token_embedding.weight, ancestor["token_embedding.weight"])


def test_quick_gelu_is_carried(tmp_path: Path) -> None:
    config = towers.model_config({**CONFIG, "quick_gelu": True})
    state = towers.build_clip(config, seed=1).state_dict()
    model = AuxiliaryCLIP.from_ancestor(state, Structure(config, num_knots=3), seed=0)
    gene = Learngene.from_auxiliary(
        model.structure, model.state_dict(), spec=towers.ModelSpec(model.structure.config), extraction={}, trained=ANY_SIZE
    )
    gene.descend(image_layers=2, text_layers=2).export(tmp_path / "m")
    clip = towers.open_clip.create_model(f"local-dir:{tmp_path / 'm'}").eval()
    assert type(clip.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    images, texts = batch(0)
    with torch.no_grad():
        assert_close(clip.encode_image(images), model(images, texts, image_layers=2, text_layers=2)["image_features"])


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def change_header(path: Path, *, sign: bool = True, **changes: object) -> None:
    header = {**json.loads(metadata_of(path)["mmlg"]), **changes}
    digest = header.pop("sha256")
    if sign:
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    save_file(load_file(path), path, metadata={"mmlg": json.dumps({**header, "sha256": digest})})


def test_a_siglip_model_keeps_its_bias(tmp_path: Path) -> None:
    """From the auxiliary model through both files to open_clip, whose logits are the auxiliary model's."""
    config = towers.with_logit_bias(towers.model_config(CONFIG))
    auxiliary = AuxiliaryCLIP.from_ancestor(towers.build_clip(config, seed=1).state_dict(), Structure(config, num_knots=3), seed=2)
    with torch.no_grad():
        auxiliary._get("stem.logit_bias").fill_(-7.5)
    Learngene.from_auxiliary(
        auxiliary.structure, auxiliary.state_dict(), spec=towers.ModelSpec(auxiliary.structure.config), extraction={}, trained=ANY_SIZE
    ).save(tmp_path / "g")
    load_learngene(tmp_path / "g").descend(image_layers=3, text_layers=2).export(tmp_path / "m")
    model, _, _ = towers.open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'm'}")
    images, texts = batch(0)
    with torch.no_grad():
        image, text, scale, bias = model.eval()(images, texts)
        expected = auxiliary.eval()(images, texts, image_layers=3, text_layers=2)
        logits = expected["logit_scale"] * F.normalize(expected["image_features"], dim=1) @ F.normalize(expected["text_features"], dim=1).T
    assert float(bias.detach()) == float(expected["logit_bias"]) == -7.5
    assert float(scale) == pytest.approx(10.0)
    assert torch.allclose(scale * image @ text.T + bias, logits - 7.5, atol=1e-4)
    single = load_learngene(tmp_path / "g").descend(image_layers=2, text_layers=None, modality="image")
    assert not [name for name in single.state if "logit" in name]
    assert towers.load_clip(tmp_path / "m").state["logit_bias"].shape == (1,)


def test_damaged_files_are_refused(learngene: Learngene, tmp_path: Path) -> None:
    path = tmp_path / "learngene.safetensors"
    with pytest.raises(UserError, match="no learngene file"):
        load_learngene(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_learngene(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="no learngene header"):
        load_learngene(path)
    learngene.save(path)
    change_header(path, version=1)
    with pytest.raises(UserError, match="version 1; this program reads 'mmlg-learngene' version 4"):
        load_learngene(path)
    learngene.save(path)
    change_header(path, sign=False, extraction={"steps": 2})
    with pytest.raises(UserError, match="does not match its own digest"):
        load_learngene(path)
    learngene.save(path)
    change_header(path, structure={**learngene.structure.to_header(), "num_knots": 6})
    with pytest.raises(UserError, match=r"coefficients_image has shape \(5, 4, 4\), its header asks for \(6, 4, 4\)"):
        load_learngene(path)
    learngene.save(path)
    change_header(path, structure={**learngene.structure.to_header(), "basis": "magic"})
    with pytest.raises(UserError, match=r"learngene\.safetensors: its header is damaged \(basis: 'magic' is unknown") as caught:
        load_learngene(path)
    assert "recipe key" not in str(caught.value)
    learngene.save(path)
    save_file({k: v for k, v in load_file(path).items() if k != "multimodal"}, path, metadata=metadata_of(path))
    with pytest.raises(UserError, match="has no tensor multimodal"):
        load_learngene(path)
    wrong = replace(learngene, tensors={**learngene.tensors, "vectors_text": torch.zeros(5, 7)})
    wrong.save(path)
    with pytest.raises(UserError, match=r"vectors_text has shape \(5, 7\)"):
        load_learngene(path)


def test_depths_and_modalities_are_checked(learngene: Learngene) -> None:
    with pytest.raises(UserError, match="image layers: 0"):
        learngene.descend(image_layers=0, text_layers=2)
    with pytest.raises(UserError, match="text layers is missing"):
        learngene.descend(image_layers=2)
    with pytest.raises(UserError, match="both, image, text"):
        learngene.descend(image_layers=2, text_layers=2, modality="audio")


def test_an_export_is_not_overwritten_unasked(learngene: Learngene, tmp_path: Path) -> None:
    descendant = learngene.descend(image_layers=1, text_layers=1)
    descendant.export(tmp_path / "m")
    with pytest.raises(UserError, match="exists"):
        descendant.export(tmp_path / "m")
    descendant.export(tmp_path / "m", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("kept")
    with pytest.raises(UserError, match="exists"):
        descendant.export(tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "file").read_text() == "kept"


def test_sizes_that_were_not_trained_are_named(learngene: Learngene, tmp_path: Path) -> None:
    """Depths and widths outside the header's range warn, each by name; those inside do not, and a saved file knows its range."""
    trained = {"image": {"layers": [2, 3], "width": [16, 16]}, "text": {"layers": [2, 3], "width": [8, 16]}}
    replace(learngene, trained=trained).save(tmp_path / "g.safetensors")
    gene = load_learngene(tmp_path / "g.safetensors")
    assert gene.trained == trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gene.descend(image_layers=2, text_layers=3, text_width=8)
        gene.descend(image_layers=2, modality="image")
    with pytest.warns(RangeWarning) as said:
        gene.descend(image_layers=1, text_layers=4, image_width=8)
    assert [str(warning.message) for warning in said] == [
        "image layers 1: this learngene was trained for 2 to 3; expect a model near chance.",
        "image width 8: this learngene was trained for 16 only; expect a weaker model; check it.",
        "text layers 4: this learngene was trained for 2 to 3; expect a weaker model; check it.",
    ]

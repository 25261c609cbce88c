"""What makes a learngene's file small: the token embedding as two factors, and bf16. Counted, and exact where it has to be."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmlg_scale import load_learngene, recipe, towers
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.embedding import CHANNELS, TOKENS, WHOLE, factorise, factorised_shapes
from mmlg_scale.learngene.file import Learngene, _digest, tensor_bytes
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.training.sizes import SizeDraw
from tests.training.tiny import ANY_SIZE, BATCH, CONFIG, batch, build_stage

VOCABULARY, WIDTH, RANK = 20, 16, 5
DOCS = Path(__file__).parents[2] / "docs" / "cost.md"


def gene(rank: int | None = RANK, dtype: str = "fp32", *, fresh: bool = False) -> tuple[AuxiliaryCLIP, Learngene]:
    """A model whose token embedding differs from open_clip's start, and its learngene."""
    config = towers.model_config(CONFIG)
    structure = Structure(config, num_knots=3, embedding_rank=rank)
    model = AuxiliaryCLIP.fresh(structure, seed=1) if fresh else AuxiliaryCLIP.from_ancestor(ancestor(), structure, seed=2)
    made = Learngene.from_auxiliary(
        structure, model.state_dict(), spec=towers.ModelSpec(config), extraction={}, trained=ANY_SIZE, dtype=dtype
    )
    return model, made


def ancestor() -> dict[str, Tensor]:
    return towers.build_clip(towers.model_config(CONFIG), seed=1).state_dict()


@pytest.mark.parametrize("shape", [(VOCABULARY, WIDTH), (7, WIDTH)])
def test_factors_are_numpys_truncated_decomposition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    for rank in (1, 3, min(shape)):
        tokens, channels = factorise(weight, rank)
        assert (tokens.shape, channels.shape) == ((shape[0], rank), (rank, WIDTH))
        expected = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank])
        torch.testing.assert_close((tokens @ channels).double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(channels @ channels.T, torch.eye(rank), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens @ channels, weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fresh", [False, True])
def test_at_full_rank_nothing_changes_and_below_it_the_start_is_the_nearest(fresh: bool) -> None:
    """Extraction starts from the ancestor's embedding, pre-training from a random one."""
    whole, full, low = (gene(rank, fresh=fresh)[0] for rank in (None, WIDTH, RANK))
    sizes = {"image_layers": 2, "text_layers": 2}
    with torch.no_grad():
        expected, found, other = (model(*batch(0), **sizes)["text_features"] for model in (whole, full, low))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (other - expected).norm() > 1e-2 * expected.norm()
    values = torch.linalg.svdvals(whole._get(f"stem.{WHOLE}"))
    lost = low._get(f"stem.{TOKENS}") @ low._get(f"stem.{CHANNELS}") - whole._get(f"stem.{WHOLE}")
    assert lost.norm().item() == pytest.approx(values[RANK:].norm().item(), rel=1e-4)


@pytest.mark.parametrize("width", [None, 8])
def test_descendants_are_plain_models_with_the_product(width: int | None, tmp_path: Path) -> None:
    """A narrower one has the leading channels, and a single image tower needs no product."""
    _, made = gene()
    tokens, channels = made.tensors[f"stem.{TOKENS}"], made.tensors[f"stem.{CHANNELS}"]
    made.save(tmp_path / "gene.safetensors")
    descendant = load_learngene(tmp_path / "gene.safetensors").descend(image_layers=2, text_layers=3, text_width=width)
    assert set(descendant.state) == set(towers.build_meta(descendant.config).state_dict())
    torch.testing.assert_close(descendant.state[WHOLE], tokens @ channels[:, :width])
    single = made.descend(image_layers=2, modality="image").state
    assert all(name.startswith("visual.") for name in single)


def test_factors_train_as_an_embedding_does() -> None:
    """At the stems' rate, without decay, and by AdamW where matrices are Muon's."""
    stage = build_stage("factorised", torch.device("cpu"))
    stage.training.optimizer = recipe.Optimizer(name="muon", learning_rate=1.0, weight_decay=0.1)
    groups = {id(parameter): group for group in stage.parameter_groups() for parameter in group["params"]}
    for name in (TOKENS, CHANNELS):
        group = groups[id(stage.model.get_parameter("model.stem/" + name.replace(".", "/")))]
        assert (group["lr"], group["weight_decay"], group["matrices"]) == (0.5, 0.0, [])


def test_a_step_is_charged_for_the_product() -> None:
    counted, charged = {}, {}
    for kind in ("extraction", "factorised"):
        stage = build_stage(kind, torch.device("cpu"))
        with FlopCounterMode(display=False) as counter:
            outputs = stage.model(*batch(0), image_layers=2, text_layers=2)
            (outputs["image_features"].sum() + outputs["text_features"].sum()).backward()
        counted[kind], charged[kind] = counter.get_total_flops(), stage.flops(0)[0]
    assert charged["factorised"] - charged["extraction"] == 3 * 2 * 8 * RANK * WIDTH
    assert counted["factorised"] - counted["extraction"] == BATCH * (charged["factorised"] - charged["extraction"])


# Files


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["mmlg"]))


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_file_says_what_it_holds(rank: int | None, dtype: str, tmp_path: Path) -> None:
    _, made = gene(rank, dtype)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    made.save(first)
    loaded = load_learngene(first)
    loaded.save(second)
    assert first.read_bytes() == second.read_bytes()
    assert (loaded.dtype, loaded.structure.embedding_rank) == (dtype, rank)
    header = header_of(first)
    assert (header["version"], header["dtype"], header["structure"].get("embedding_rank")) == (4, dtype, rank)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.tensors.values())
    assert loaded.num_params == sum(math.prod(shape) for shape in made.structure.shapes().values())
    assert sum(tensor.numel() * tensor.element_size() for tensor in load_file(first).values()) == tensor_bytes(made.structure, dtype)


def test_a_file_from_before_both_settings_is_read(tmp_path: Path) -> None:
    _, made = gene(None)
    made.save(tmp_path / "now.safetensors")
    header = header_of(tmp_path / "now.safetensors")
    assert "embedding_rank" not in header["structure"]
    before = {key: value for key, value in header.items() if key not in ("dtype", "sha256")}
    signed = json.dumps({**before, "sha256": _digest(before)}, sort_keys=True)
    save_file(load_file(tmp_path / "now.safetensors"), tmp_path / "before.safetensors", metadata={"mmlg": signed})
    found = load_learngene(tmp_path / "before.safetensors")
    assert (found.dtype, found.structure.embedding_rank) == ("fp32", None)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_descendants_of_a_bf16_file_are_those_of_the_rounded_tensors(tmp_path: Path) -> None:
    """Blocks and matrices rounded, to the bit; coefficients, vectors and the logit scale as they were."""
    _, exact = gene()
    exact.rounded("bf16").save(tmp_path / "half.safetensors")
    stored = load_file(tmp_path / "half.safetensors")
    rounded = {}
    for name, tensor in exact.tensors.items():
        kept = name.startswith(("coefficients", "vectors")) or tensor.ndim < 2
        assert stored[name].dtype == (torch.float32 if kept else torch.bfloat16), name
        rounded[name] = tensor if kept else tensor.bfloat16().float()
    assert not torch.equal(rounded["multimodal"], exact.tensors["multimodal"])
    wanted = Learngene(rounded, exact.structure, exact.spec, {}, ANY_SIZE).descend(image_layers=3, text_layers=2, text_width=8).state
    found = load_learngene(tmp_path / "half.safetensors").descend(image_layers=3, text_layers=2, text_width=8).state
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


def test_a_bf16_file_is_sealed(tmp_path: Path) -> None:
    """Its SHA-256 is of the bf16 numbers, and the header's type must be the tensors'."""
    _, made = gene(dtype="bf16")
    path = tmp_path / "gene.safetensors"
    made.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["multimodal"][0, 3] += 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match="do not match the SHA-256"):
        load_learngene(path)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, path, metadata=metadata)
    with pytest.raises(UserError, match="holds float32 numbers, not bfloat16"):
        load_learngene(path)


def test_a_run_writes_what_its_recipe_asks_for(tmp_path: Path) -> None:
    stage = build_stage("factorised", torch.device("cpu"))
    stage.settings.file_dtype = "bf16"  # type: ignore[attr-defined]
    result = stage.export(stage.model.state_dict(), tmp_path)
    loaded = load_learngene(tmp_path / "learngene.safetensors")
    assert (loaded.dtype, loaded.structure.embedding_rank) == ("bf16", RANK)
    assert loaded.extraction == json.loads(json.dumps(asdict(stage.settings)))  # type: ignore[attr-defined]
    assert result["params"] == loaded.num_params
    assert result["bytes"] == (tmp_path / "learngene.safetensors").stat().st_size


def test_runs_without_the_settings_keep_their_identity() -> None:
    """A run from before there were such settings is still the same run; one that uses them is another."""
    plain = recipe.Recipe(pretraining=recipe.Pretraining())
    settings: tuple[dict[str, Any], ...] = ({"embedding_rank": RANK}, {"file_dtype": "bf16"})
    for role, section in (("extraction", "extraction"), ("pretraining", "pretraining")):
        init = "mmlg" if role == "extraction" else None
        before = plain.used_by(role, init=init)
        assert {"num_knots", "max_layers"} <= set(before[section])
        assert not {"embedding_rank", "file_dtype"} & set(before[section])
        for given in settings:
            changed = recipe.Recipe(extraction=recipe.Extraction(**given), pretraining=recipe.Pretraining(**given))
            assert changed.used_by(role, init=init)[section] == {**before[section], **given}


# Sizes of real models


@functools.cache
def counts(architecture: str) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """Of a real model: the whole's parameters, a learngene's outside its stems, and the stems' shapes."""
    config = towers.model_config(architecture)
    structure = Structure(config)
    return num_params(towers.build_meta(config).state_dict()), num_params(structure.block_shapes()), structure.stem_shapes


def num_params(tensors: Mapping[str, Any]) -> int:
    return sum(math.prod(getattr(tensor, "shape", tensor)) for tensor in tensors.values())


def fraction(architecture: str, rank: int | None) -> float:
    whole, blocks, stems = counts(architecture)
    return (blocks + num_params(factorised_shapes(stems, rank))) / whole


def test_the_documented_fractions_are_counted() -> None:
    """The table of docs/cost.md, cell by cell. ViT-B/32: 18 % at rank 128 where it was 30.3 %; ViT-L/14: 10 % where it was 17 %."""
    table = re.search(r"^\| embedding_rank \|(.+)\|\n\|[-|]+\n((?:\|.+\n)+)", DOCS.read_text(), re.MULTILINE)
    assert table is not None
    names = [name.strip() for name in table[1].split("|")]
    architectures = {"ViT-B/32": "ViT-B-32", "ViT-L/14": "ViT-L-14"}
    assert names == list(architectures)
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table[2].splitlines()}
    assert {"null", "64", "128", "256"} <= set(rows)
    for rank, cells in rows.items():
        for name, cell in zip(names, cells, strict=True):
            found = fraction(architectures[name], None if rank == "null" else int(rank))
            assert cell.strip() == f"{100 * found:.1f} %", (name, rank)
    assert fraction("ViT-B-32", 128) == pytest.approx(0.178, abs=1e-3)
    assert fraction("ViT-L-14", 128) == pytest.approx(0.096, abs=1e-3)


def test_bf16_halves_a_real_file() -> None:
    structure = Structure(towers.model_config("ViT-B-32"), embedding_rank=128)
    assert tensor_bytes(structure, "bf16") / tensor_bytes(structure, "fp32") == pytest.approx(0.5, abs=0.003)


def test_flops_at_other_widths() -> None:
    """The product is charged at the width that is drawn."""
    settings = recipe.Extraction(embedding_rank=RANK, width_shares=[0.5])
    config = towers.model_config(CONFIG)
    with_rank, without = (SizeDraw(given, config, 0).flops(0) for given in (settings, recipe.Extraction(width_shares=[0.5])))
    assert with_rank - without == 3 * 2 * 8 * RANK * (WIDTH // 2)

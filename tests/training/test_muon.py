"""Muon against torch's own, against singular vectors, and the places of matrices in flat blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from mmlg_scale import recipe
from mmlg_scale.training.muon import MuonAdamW, orthogonalise, places_of
from mmlg_scale.training.stages import parameter_groups
from tests.training.tiny import build_stage


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (3, 6, 4)])
def test_orthogonalise_keeps_singular_vectors(shape: tuple[int, ...]) -> None:
    """All singular values come near 1, and U and V stay: the product with V U^T is symmetric with eigenvalues near 1."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(given)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    core = left.mT @ found @ right.mT
    assert (core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


def steps(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: torch.Tensor) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_one_matrix_is_updated_as_by_torch(shape: tuple[int, int]) -> None:
    """Up to bf16, in which torch's Newton-Schulz computes."""
    generator = torch.Generator().manual_seed(1)
    start, gradients = torch.randn(shape, generator=generator), torch.randn(5, *shape, generator=generator)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    torchs = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.2, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    group = {"params": [ours], "matrices": places_of("weight", shape), "weight_decay": 0.2}
    expected, found = steps(torchs, theirs, gradients), steps(MuonAdamW([group], lr=0.1), ours, gradients)
    assert (found - expected).norm() < 0.03 * (expected - start).norm()


def test_groups_without_matrices_are_adamw() -> None:
    generator = torch.Generator().manual_seed(2)
    start, gradients = torch.randn(7, generator=generator), torch.randn(4, 7, generator=generator)
    matrix = nn.Parameter(torch.ones(2, 2))
    one, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mixed = MuonAdamW([{"params": [matrix], "matrices": [(0, 2, 2)]}, {"params": [one]}], lr=0.01, weight_decay=0.1)
    assert torch.equal(steps(mixed, one, gradients), steps(torch.optim.AdamW([other], lr=0.01, weight_decay=0.1), other, gradients))


def test_flat_blocks_are_updated_matrix_by_matrix() -> None:
    """A learngene's [K, P] parameters move as their matrices do, each in a parameter of its own."""
    stage = build_stage("extraction", torch.device("cpu"))
    settings = recipe.Optimizer(name="muon", learning_rate=0.1, weight_decay=0.1)
    stage.training.optimizer = settings
    structure = stage.auxiliary.structure  # type: ignore[attr-defined]
    groups = {id(parameter): group for group in stage.parameter_groups() for parameter in group["params"]}
    for name in ("multimodal", "unimodal_text"):
        flat = stage.model.get_parameter(f"model.{name}")
        group = groups[id(flat)]
        assert group["matrices"]
        generator = torch.Generator().manual_seed(3)
        flat.grad = torch.randn(flat.shape, generator=generator)
        layout = structure.layout("text")
        expected = {}
        for entry in layout.matrices:
            parts = 3 if "in_proj" in entry.name else 1
            for part, (value, gradient) in enumerate(
                zip(entry.view(flat)[0].chunk(parts), entry.view(flat.grad)[0].chunk(parts), strict=True)
            ):
                alone = nn.Parameter(value.detach().clone())
                alone.grad = gradient.clone()
                MuonAdamW([{"params": [alone], "matrices": places_of("alone", alone.shape)}], lr=0.1, weight_decay=0.1).step()
                expected[entry.name, part] = alone.detach()
        before = flat.detach().clone()
        others = [parameter for parameter in group["params"] if parameter is not flat]
        for parameter in others:
            parameter.grad = torch.zeros_like(parameter)
        MuonAdamW([group], weight_decay=0.1).step()
        for entry in layout.matrices:
            parts = 3 if "in_proj" in entry.name else 1
            for part, value in enumerate(entry.view(flat)[0].chunk(parts)):
                torch.testing.assert_close(value.detach(), expected[entry.name, part], rtol=1e-5, atol=1e-5)
        assert not torch.equal(before, flat)


def test_every_decayed_parameter_is_covered_by_its_places() -> None:
    for kind in ("ancestor", "extraction"):
        stage = build_stage(kind, torch.device("cpu"))
        for group in parameter_groups(stage.model, recipe.Optimizer(name="muon")) if kind == "ancestor" else stage.parameter_groups():
            covered = sorted((offset, offset + rows * columns) for offset, rows, columns in group["matrices"])
            if covered:
                assert covered[0][0] == 0
                assert all(end == start for (_, end), (start, _) in itertools.pairwise(covered))
                assert covered[-1][1] == sum(parameter.numel() for parameter in group["params"])

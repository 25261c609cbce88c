"""Compiled blocks compute what the others do, without graph breaks, and are compiled once for all depths and caption lengths."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mmlg_scale import towers
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.runtime import Runtime
from mmlg_scale.towers import attention, compiled
from mmlg_scale.training.engine import start_ranks
from mmlg_scale.training.teacher import PlainCLIP
from tests.towers.models import assert_one_line

CONFIG = towers.model_config(
    {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 8, "layers": 3},
        "text_cfg": {"context_length": 24, "vocab_size": 20, "width": 16, "heads": 2, "layers": 3},
    }
)
TOLERANCE = 1e-5
DEPTHS = ({"image_layers": 2, "text_layers": 3}, {"image_layers": 4, "text_layers": 2}, {"image_layers": 1, "text_layers": 5})


@pytest.fixture(scope="module", params=["traced", pytest.param("inductor", marks=pytest.mark.slow)])
def graphs(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Counts of torch.compile from here on; `traced` makes the same graphs and runs them by torch's own operators."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "traced":
            patch.setattr(compiled, "BACKEND", "aot_eager")
        fresh()
        yield counters
        fresh()


def fresh() -> None:
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()


def batch(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    texts = torch.randint(3, 19, (6, length), generator=generator)
    texts[torch.arange(6), length - 1 - torch.arange(6) % 4] = 19
    return torch.randn(6, 3, 16, 16, generator=generator), texts


def numbers(model: torch.nn.Module, length: int, **options: Any) -> dict[str, Tensor]:
    """Features, hidden states and all gradients of a sum of random shares of them."""
    images, texts = batch(length)
    generator = torch.Generator().manual_seed(1)
    model.zero_grad()
    outputs = model(images, texts, **options)
    named = {"image": outputs["image_features"], "text": outputs["text_features"]}
    named |= {f"{tower} {i}": state for tower in ("image", "text") for i, state in enumerate(outputs[f"{tower}_hidden"])}
    sum((torch.randn(x.shape, generator=generator) * x).sum() for x in named.values()).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().clone() for name, tensor in (named | gradients).items()}


def assert_equal(model: torch.nn.Module, length: int, **options: Any) -> None:
    switch(model, False)
    wanted = numbers(model, length, **options)
    switch(model, True)
    found = numbers(model, length, **options)
    assert set(found) == set(wanted)
    assert any(name.endswith("weight") or name == "multimodal" for name in found)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= TOLERANCE * tensor.norm() + 1e-7, name


def switch(model: torch.nn.Module, on: bool) -> None:
    for module in model.modules():
        if isinstance(module, towers.CompiledBlocks):
            module.compiled = on


def plain() -> PlainCLIP:
    clip = towers.build_clip(CONFIG, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return PlainCLIP(clip)


def auxiliary() -> AuxiliaryCLIP:
    return AuxiliaryCLIP.from_ancestor(plain().clip.state_dict(), Structure(CONFIG, num_knots=4), seed=1)


def test_plain_towers(graphs: dict[str, Any]) -> None:
    """At two caption lengths, checkpointed or not, with patches dropped, and with a last block that is compared whole."""
    model = plain()
    assert_equal(model, 8)
    assert_equal(model, 16, checkpoint=True)
    assert_equal(model, 24, patches=torch.tensor([[0, 2]] * 6))
    assert_equal(model, 16, tap_image=(2, 3), tap_text=(1, 3))
    assert not graphs["graph_break"]


def test_one_graph_serves_every_depth_and_length(graphs: dict[str, Any]) -> None:
    """Of each tower a whole and a pooled block; nothing is compiled after the first step."""
    model = auxiliary()
    assert_equal(model, 16, **DEPTHS[0])
    before = graphs["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (8, 24, 16):
            for depths in DEPTHS:
                assert_equal(model, length, **depths)
                assert_equal(model, length, **depths, checkpoint=True, compose_per_layer=True)
    assert graphs["stats"]["unique_graphs"] == before
    assert not graphs["graph_break"]


@pytest.mark.slow
def test_widths_have_graphs_of_their_own(graphs: dict[str, Any]) -> None:
    model = auxiliary()
    for width in (16, 24, 32):
        assert_equal(model, 16, **DEPTHS[0], image_width=width, text_width=8 if width == 24 else 16)
    assert not graphs["graph_break"]


@pytest.mark.slow
def test_bf16(graphs: dict[str, Any]) -> None:
    model = plain()
    exact = numbers(model, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = numbers(model, 16)
        switch(model, True)
        found = numbers(model, 16)
    assert not graphs["graph_break"]
    for name, tensor in exact.items():
        away = (found[name] - tensor).norm() / tensor.norm()
        assert away <= 2 * (eager[name] - tensor).norm() / tensor.norm() + 1e-3, name
    assert any(not torch.equal(found[name], exact[name]) for name in exact), "this was computed in fp32"


def test_evaluations_are_not_compiled_and_teachers_are(graphs: dict[str, Any]) -> None:
    model = plain()
    switch(model, True)
    fresh()
    with torch.no_grad():
        model.eval()(*batch(16))
        assert not graphs["stats"]["unique_graphs"]
        model.requires_grad_(False)(*batch(16))
    assert graphs["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_short_sequences(causal: bool) -> None:
    """Against the definition in fp64, forwards and backwards."""
    for length in (1, 17, attention.SHORT):
        packed = torch.randn(3, length, 3 * 16, generator=torch.Generator().manual_seed(length), requires_grad=True)
        query, key, value = packed.double().unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / 8**0.5
        if causal:
            scores = scores + torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        wanted = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        found = attention.short_attention(packed, 2, causal)
        weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
        gradients = [torch.autograd.grad((out * weight).sum(), packed)[0] for out in (found, wanted)]
        assert (found - wanted).norm() <= 1e-6 * wanted.norm()
        assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[1].norm()


def test_a_machine_without_a_compiler_says_so_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"runtime.compile needs a C\+\+ compiler.* or set runtime.compile to false"):
        start_ranks(Runtime(compile=True))
    monkeypatch.setenv("CXX", "c++-of-nowhere -O2")
    with pytest.raises(UserError, match=r"CXX names c\+\+-of-nowhere, which is not there"):
        start_ranks(Runtime(compile=True))


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a file in torch's cache of which a killed run has written a part."""

    def fails(graph: Any, inputs: Any) -> Any:
        raise ImportError("/tmp/x.so: file too short")

    monkeypatch.setattr(compiled, "BACKEND", fails)
    fresh()
    model = plain()
    switch(model, True)
    told = assert_one_line(lambda: model(*batch(8)), compiled._cache(), "x.so: file too short", "set runtime.compile to false")
    assert "Remove its cache" in told
    fresh()

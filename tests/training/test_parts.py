"""Parts of training on their own: the schedule, the losses' values, what weight decay touches, meters' files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import forward_flops
from mmlg_scale.errors import UserError
from mmlg_scale.objectives import contrastive, distillation, feature_distance, hidden_distance
from mmlg_scale.training.loop import rate_factor
from mmlg_scale.training.meters import Meters
from mmlg_scale.training.sizes import SizeDraw
from mmlg_scale.training.stages import ClipStage, ElasticStage, ExtractionStage, parameter_groups
from mmlg_scale.training.teacher import LiveTeacher, tap_layers
from mmlg_scale.training.trackers import JsonLines
from tests.training.tiny import CONFIG, batch, build_stage, plain_loss


def test_schedule_by_hand() -> None:
    """Ten steps of warm-up in a hundred, then a cosine to zero."""
    assert [rate_factor(step, 100, 0.1) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate_factor(10, 100, 0.1) == 1.0
    assert rate_factor(55, 100, 0.1) == pytest.approx(0.5)
    assert rate_factor(99, 100, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert rate_factor(0, 1, 0.0) == 1.0


def test_layers_compared() -> None:
    assert tap_layers([0.25, 0.5, 0.75, 1.0], 8) == (2, 4, 6, 8)
    assert tap_layers([0.25, 0.5, 0.75, 1.0], 2) == (1, 1, 2, 2)
    assert tap_layers([0.25, 0.5, 0.75, 1.0], 5) == (1, 3, 4, 5)


def test_hidden_distance_leaves_padding_out() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    rows = [(0, 0), (0, 1), (1, 0)]
    s, t = (torch.stack([x[i, j] for i, j in rows]).double() for x in (student, teacher))
    expected = ((s - t) ** 2).mean() / ((t - t.mean()) ** 2).mean()
    assert float(hidden_distance([student, student], [teacher, teacher], valid)) == pytest.approx(2 * float(expected), rel=1e-6)


def test_feature_distance_ignores_length() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 4, generator=generator)
    assert float(feature_distance(features, 3 * features)) == pytest.approx(0, abs=1e-6)
    assert float(feature_distance(features, -features)) == pytest.approx(2)


def test_affinity_by_hand() -> None:
    """The cross entropy of the ancestor's softmax over each image's texts, and each text's images, in fp64."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {"image_features": torch.randn(6, n, generator=generator), "text_features": torch.randn(6, n, generator=generator)} for n in (4, 5)
    )
    student["logit_scale"], teacher["logit_scale"] = torch.tensor([3.0]), torch.tensor([9.0])
    logits, theirs = (
        (x["logit_scale"] * F.normalize(x["image_features"], dim=1) @ F.normalize(x["text_features"], dim=1).T).double()
        for x in (student, teacher)
    )
    affinity = sum(F.cross_entropy(a, b.softmax(dim=1)) for a, b in ((logits, theirs), (logits.T, theirs.T))) / 2
    pairs = sum(F.cross_entropy(a, torch.arange(6)) for a in (logits, logits.T)) / 2
    weights = recipe.DistillationLoss(contrastive=0.5, affinity=2.0, feature=0.0, hidden=0.0)
    loss, terms = distillation(student, teacher, torch.zeros(6, 1, dtype=torch.long), weights)
    assert float(loss) == pytest.approx(float(0.5 * pairs + 2 * affinity), rel=1e-6)
    assert list(terms) == ["contrastive_with_affinity"]


def test_siglip_by_hand() -> None:
    """The definition in fp64, and open_clip's own."""
    generator = torch.Generator().manual_seed(0)
    outputs = {f"{tower}_features": torch.randn(6, 4, generator=generator) for tower in ("image", "text")}
    outputs |= {"logit_scale": torch.tensor([8.0]), "logit_bias": torch.tensor([-3.0])}
    image, text = (F.normalize(outputs[f"{tower}_features"], dim=1) for tower in ("image", "text"))
    signs = 2 * torch.eye(6, dtype=torch.float64) - 1
    expected = -F.logsigmoid(signs * (8 * image.double() @ text.double().T - 3)).sum() / 6
    assert float(contrastive(outputs)) == pytest.approx(float(expected), rel=1e-6)
    theirs = towers.open_clip.loss.SigLipLoss()(image, text, outputs["logit_scale"], outputs["logit_bias"])
    assert float(contrastive(outputs)) == pytest.approx(float(theirs), rel=1e-5)


def test_a_scale_above_the_bound_can_come_back() -> None:
    scale = torch.tensor([6.0], requires_grad=True)
    multiplier = towers.logit_multiplier(scale)
    assert multiplier.item() == pytest.approx(100.0, rel=1e-6)
    multiplier.backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(100.0, rel=1e-6)


def test_several_students_share_the_teacher() -> None:
    one, three = (build_stage(kind, torch.device("cpu")) for kind in ("extraction", "students"))
    assert isinstance(three, ExtractionStage)
    sizes = [three.sizes(step) for step in range(20)]
    assert isinstance(one, ExtractionStage)
    assert [step[0] for step in sizes] == [one.sizes(step)[0] for step in range(20)]
    assert len({size["image_layers"] for step in sizes for size in step}) > 1
    assert any(step[0] != step[1] for step in sizes)
    alone = [forward_flops(towers.with_sizes(three.spec.config, **size))["total"] for size in sizes[0]]
    assert three.flops(0) == (3 * sum(alone), one.flops(0)[1])


def test_the_greatest_size_of_a_step_teaches_the_others() -> None:
    """By hand, with autograd's gradients: every size has the contrastive loss; all but the first are drawn to the first's features."""
    stage = build_stage("in_place", torch.device("cpu"))
    assert isinstance(stage, ElasticStage)
    sizes = [stage.sizes(step) for step in range(20)]
    assert all(size == {"image_layers": 3, "text_layers": 3, "image_width": 16, "text_width": 16} for size, _, _ in sizes)
    assert all(size == {"image_layers": 2, "text_layers": 2, "image_width": 8, "text_width": 8} for _, size, _ in sizes)
    assert {size["image_layers"] for _, _, size in sizes} == {2, 3}
    assert {size["image_width"] for _, _, size in sizes} == {8, 16}

    images, texts = batch(0)
    outputs = [stage.model(images, texts, **student) for student in stage.students(0)]
    pairs = [
        (F.normalize(output["image_features"], dim=1), F.normalize(output["text_features"], dim=1), output["logit_scale"])
        for output in outputs
    ]
    logits = [scale * image @ text.T for image, text, scale in pairs]
    own = [(F.cross_entropy(each, torch.arange(32)) + F.cross_entropy(each.T, torch.arange(32))) / 2 for each in logits]
    towards = [sum((1 - (a * b.detach()).sum(dim=1)).mean() for a, b in zip(each[:2], pairs[0][:2], strict=True)) for each in pairs[1:]]
    expected = (sum(own) + 4 * sum(towards)) / 3
    found = plain_loss(stage, 0)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    parameters = list(stage.model.parameters())
    for ours, by_hand in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        assert float((ours - by_hand).norm()) <= 1e-5 * float(by_hand.norm()) + 1e-7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "sandwich"}, "recipe key pretraining.sampling: is sandwich, which takes two sizes a step"),
        ({"in_place": 1.0, "students_per_step": 2}, "recipe key pretraining.in_place: compares with the greatest size of a step"),
    ],
)
def test_sandwich_needs_several_sizes_and_in_place_a_sandwich(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe.Recipe(pretraining=recipe.Pretraining(**settings)).check()


def test_only_matrices_decay() -> None:
    clip = towers.build_clip(towers.model_config(CONFIG), seed=0)
    names = {id(parameter): name for name, parameter in clip.named_parameters()}
    decayed, free = sorted(parameter_groups(clip, recipe.Optimizer(weight_decay=0.3)), key=lambda group: -group["weight_decay"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    found = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"visual.conv1.weight", "visual.proj", "text_projection", "transformer.resblocks.0.mlp.c_fc.weight"} <= found
    assert not found & {"logit_scale", "token_embedding.weight", "positional_embedding", "visual.class_embedding", "ln_final.weight"}
    assert len(found) + len(free["params"]) == len(names)


def test_extraction_rates() -> None:
    stage = build_stage("extraction", torch.device("cpu"))
    assert isinstance(stage, ExtractionStage)
    stage.training = recipe.Training(optimizer=recipe.Optimizer(learning_rate=1.0, weight_decay=0.1))
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in stage.parameter_groups() for p in group["params"]}
    auxiliary = stage.auxiliary
    assert settings[id(auxiliary.multimodal)] == (1.0, 0.1)
    assert settings[id(auxiliary.coefficients_text)] == (3.0, 0.0)
    assert settings[id(auxiliary.vectors_image)] == (1.0, 0.0)
    assert settings[id(auxiliary.get_parameter("stem/visual/proj"))] == (0.5, 0.1)
    assert settings[id(auxiliary.get_parameter("stem/logit_scale"))] == (0.5, 0.0)
    assert len(settings) == len(list(stage.model.parameters()))


def test_hidden_maps_decay_in_no_kind_of_training() -> None:
    """Separate distillation, the baseline, treats its maps as extraction does."""
    model = towers.Bundle(
        towers.ModelSpec(towers.model_config(CONFIG)), towers.build_clip(towers.model_config(CONFIG), seed=1).state_dict()
    )
    teacher = LiveTeacher(model, torch.device("cpu"))
    weights, training = recipe.DistillationLoss(), recipe.Training()
    distillation_stage = ClipStage("distil", model, training, torch.device("cpu"), teacher=teacher, weights=weights)
    extraction = build_stage("extraction", torch.device("cpu"))
    extraction.training = training
    for stage in (distillation_stage, extraction):
        decays = {id(p): group["weight_decay"] for group in stage.parameter_groups() for p in group["params"]}
        named = dict(stage.model.named_parameters())
        assert [decays[id(named[f"{tower}_map.weight"])] for tower in ("image", "text")] == [0.0, 0.0]
        assert 0.1 in decays.values()


def test_depths_are_drawn_by_seed_and_step_alone() -> None:
    stage = build_stage("extraction", torch.device("cpu"))
    assert isinstance(stage, ExtractionStage)
    depths = [stage.sizes(step)[0]["image_layers"] for step in range(200)]
    assert set(depths) == {2, 3}
    assert 70 < depths.count(2) < 130
    assert [stage.sizes(step)[0]["text_layers"] for step in (5, 150, 5)] == [depths[5], depths[150], depths[5]]


def test_depths_grow_over_a_fraction_of_the_steps() -> None:
    """Of 100 steps the first 60 have the depths up to 2, 3, 4 and 5 for fifteen each; then all are drawn alike, as without growth."""
    config = towers.model_config(CONFIG | {name: {**CONFIG[name], "layers": 5} for name in ("vision_cfg", "text_cfg")})  # type: ignore[dict-item]
    training = recipe.Training(steps=100)
    grows, whole = (SizeDraw(recipe.Pretraining(training=training, growth=growth), config, 3) for growth in (0.6, 0.0))
    for first, most in ((0, 2), (15, 3), (30, 4), (45, 5)):
        depths = [grows.sizes(step)[0]["image_layers"] for step in range(first, first + 15)]
        assert (min(depths), max(depths)) == (2, most)
    assert [grows.sizes(step) for step in range(60, 100)] == [whole.sizes(step) for step in range(60, 100)]
    assert grows.total_flops(100) == sum(grows.flops(step) for step in range(100)) < whole.total_flops(100)
    assert grows.trained_range() == whole.trained_range()

    sandwich = recipe.Pretraining(training=training, growth=0.6, sampling="sandwich", students_per_step=2)
    greatest = [sizes[0]["text_layers"] for sizes in map(SizeDraw(sandwich, config, 3).sizes, (0, 14, 15, 30, 44, 45, 99))]
    assert greatest == [2, 2, 3, 4, 4, 5, 5]


def test_a_resumed_run_has_every_line_once(tmp_path: Path) -> None:
    meters = Meters([JsonLines(tmp_path)], 40, name="x", device=torch.device("cpu"), log_every=10)
    meters.resume_from(0)
    for step in range(1, 31):
        meters.step(step, {"loss": torch.tensor(float(step)), "learning_rate": 0.1}, num_samples=4, flops=8)
    meters.evaluation(30, {"q": 0.5})
    seconds = meters.state_dict()["seconds"]
    meters.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "lo')  # a kill in the middle of a line
    meters = Meters([JsonLines(tmp_path)], 40, name="x", device=torch.device("cpu"), log_every=10)
    meters.load_state_dict({"seconds": seconds + 100})
    meters.resume_from(20)
    for step in range(21, 41):
        meters.step(step, {"loss": torch.tensor(torch.nan), "learning_rate": 0.1}, num_samples=4, flops=8)
    assert meters.seconds > seconds + 100
    meters.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (10, 10.0), (20, 20.0), (30, None), (40, None)]

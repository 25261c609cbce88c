"""What `mmlg plan` says before a run, against what building and running really takes. (A whole family: tests/test_family.py.)"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmlg_scale import recipe, towers
from mmlg_scale.accounting import training_flops
from mmlg_scale.cli import main
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.forecast import StepCost, StepForecast, _until_the_end, forecast
from mmlg_scale.memory import activation_bytes, peak_bytes, state_bytes
from mmlg_scale.recipe_file import load_recipe
from mmlg_scale.records import write_record
from mmlg_scale.training.learngene_roles import ExtractionRole
from mmlg_scale.training.roles import AncestorRole, Context
from mmlg_scale.training.stages import ClipStage
from tests.training.tiny import CONFIG

GPU = 1e15
"""A peak in FLOP/s: nothing is measured."""


@functools.cache
def planned(name: str, **options: Any) -> Any:
    settings, runtime = load_recipe(name, **options)
    return forecast(settings, runtime, None, peak_flops=GPU, mfu=0.5)


def steps_of(name: str, **options: Any) -> dict[str, StepForecast]:
    return {step.id: step for step in planned(name, **options).steps}


def test_training_flops_are_what_torch_counts_forward_and_backward() -> None:
    config = towers.model_config({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layers": 6}})  # type: ignore[dict-item]
    model = towers.Bundle(towers.ModelSpec(config), towers.build_clip(config, seed=0).state_dict())
    stage = ClipStage("ancestor", model, recipe.Training(steps=1, batch_size=4), torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = stage.model(torch.randn(4, 3, 16, 16), torch.randint(3, 19, (4, 8)), patches=None)
        (outputs["image_features"].sum() + outputs["text_features"].sum()).backward()
    counted = counter.get_total_flops() / 4
    assert stage.flops(0) == (training_flops(config), 0)
    # The formula charges a gradient of the images too, which nobody needs: at this size 3 % of the whole.
    assert counted == pytest.approx(training_flops(config), rel=0.04)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("width", "mlp_ratio"), [(64, 4.0), (128, 2.0)])
@pytest.mark.parametrize("pooled", [("image", "text"), ()])
def test_activations_are_what_autograd_keeps(bf16: bool, width: int, mlp_ratio: float, pooled: tuple[str, ...]) -> None:
    """Without its last hidden state a tower computes of its last block one position."""
    taps = () if pooled else (6,)
    tower = {"width": width, "mlp_ratio": mlp_ratio, "layers": 6}
    config = towers.model_config(
        {
            "embed_dim": 32,
            "vision_cfg": {**tower, "image_size": 32, "patch_size": 8, "head_width": 32},
            "text_cfg": {**tower, "context_length": 16, "vocab_size": 50, "heads": width // 32},
        }
    )
    clip = towers.build_clip(config, seed=0)
    weights = {parameter.data_ptr() for parameter in clip.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its place would be another's
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        image = towers.encode_image_with_hidden(clip, torch.randn(32, 3, 32, 32), taps)[0]
        text = towers.encode_text_with_hidden(clip, torch.randint(1, 20, (32, 16)), taps)[0]
    assert image.requires_grad
    assert text.requires_grad
    params = sum(parameter.numel() for parameter in clip.parameters())
    estimated = 32 * activation_bytes(config, bf16=bf16, checkpointing=False, pooled=pooled) + (2 * params if bf16 else 0)
    assert sum(kept.values()) == pytest.approx(estimated, rel=0.12)
    assert activation_bytes(config, bf16=bf16, checkpointing=True) < 0.4 * activation_bytes(config, bf16=bf16, checkpointing=False)


def test_state_by_zero_stage() -> None:
    """Of 8 parameters on 4 ranks: 4 bytes each for weights and gradients, 8 for two moments; with ZeRO 4 more for a copy."""
    assert state_bytes(8, zero_stage=0, ranks=4) == {"weights": 32, "gradients": 32, "optimizer": 64}
    assert state_bytes(8, zero_stage=1, ranks=4) == {"weights": 32, "gradients": 32, "optimizer": 24}
    assert state_bytes(8, zero_stage=2, ranks=4) == {"weights": 32, "gradients": 8, "optimizer": 24}
    assert state_bytes(8, zero_stage=3, ranks=4) == {"weights": 8, "gradients": 8, "optimizer": 24}


def test_the_fullest_moment_by_hand() -> None:
    """Of 100 parameters on 4 ranks, buckets of 20: 400 bytes of weights; 80 a bucket; a rank's part is 100 bytes."""

    def peak(zero_stage: int, activations: float, **options: Any) -> tuple[float, float, float]:
        given = {"ranks": 4, "bucket_size": 20, "overlap": True} | options
        found = peak_bytes(100, zero_stage=zero_stage, activations=activations, **given)
        assert (found["weights"], found["optimizer"]) == ((400, 800) if zero_stage == 0 else (400, 300))
        return found["gradients"], found["buffers"], found["activations"]

    assert peak(0, 900) == (0, 0, 900)
    assert peak(0, 700) == (400, 400, 0)  # all gradients, and a flat copy of them to exchange
    assert peak(0, 700, ranks=1) == (0, 0, 700)
    assert peak(0, 700, accumulates=True) == (400, 0, 700)
    assert peak(0, 700, bf16_communication=True) == (400, 600, 0)
    assert peak(1, 700) == (0, 160, 700)  # two buckets
    assert peak(1, 400) == (400, 180, 0)  # all gradients, this rank's flat, a second bucket
    assert peak(2, 400) == (0, 160, 400)
    # Two buckets, and this rank's part twice but for what is in the bucket: 2 x 80 + 2 x 100 x 0.8; a second bucket.
    assert peak(2, 100) == (100, 300, 0)
    assert peak(2, 100, overlap=False) == (100, 220, 0)


def test_the_demo_costs_what_its_stages_charge(tmp_path: Path) -> None:
    """Real stages on the real scenes: parameters, FLOPs of the ancestor and of every drawn size of the extraction, memory of the states."""
    write_scenes(tmp_path / "data", num_train=8, num_val=4, num_test=4)
    settings, runtime = load_recipe("demo", **{"data.path": str(tmp_path / "data")})
    context = Context(open_pairs(settings.data.path), runtime, torch.device("cpu"))
    found = steps_of("demo")
    ancestor = AncestorRole(settings).build(context)
    cost = found["ancestor"].cost
    assert cost.params == sum(parameter.numel() for parameter in ancestor.model.parameters())
    samples = settings.ancestor.steps * settings.ancestor.batch_size
    assert (cost.flops, cost.teacher_flops) == (samples * ancestor.flops(0)[0], 0)
    assert cost.memory is not None
    assert cost.memory["optimizer"] == 8 * cost.params
    assert cost.checkpoint_bytes == 3 * 12 * cost.params

    towers.export(towers.Bundle(ancestor.spec, ancestor.model.clip.state_dict()), tmp_path / "model")  # type: ignore[union-attr, operator]
    extraction = ExtractionRole(settings, tmp_path / "model").build(context)
    training = settings.extraction.training
    per_step = [extraction.flops(step) for step in range(training.steps)]
    cost = found["learngene"].cost
    assert len({student for student, _ in per_step}) > 5  # sizes differ
    assert cost.flops == training.batch_size * sum(student for student, _ in per_step)
    assert cost.teacher_flops == training.batch_size * sum(teacher for _, teacher in per_step)
    trained = sum(parameter.numel() for parameter in extraction.model.parameters())
    assert cost.memory is not None
    assert cost.memory["weights"] == 4 * trained
    assert cost.params == trained - 2 * 64 * 64  # without the maps between hidden states
    assert cost.memory["ancestor"] == 4 * found["ancestor"].cost.params


def test_a_smaller_learngene_file_is_planned_as_such() -> None:
    """The demo's tokenizer has 33 tokens of width 64: factors of rank 8 in place of 33 x 64 numbers; most of the rest in 2 bytes."""
    plain = steps_of("demo")["learngene"].cost
    cost = steps_of("demo", **{"extraction.embedding_rank": 8, "extraction.file_dtype": "bf16"})["learngene"].cost
    assert plain.params - cost.params == 33 * 64 - 8 * (33 + 64)
    assert plain.export_bytes == 4 * plain.params
    assert 2 * cost.params < cost.export_bytes < 2.2 * cost.params
    assert cost.trains.endswith("1 shared, 1 a tower; embedding of rank 8")
    assert cost.flops > plain.flops


def test_runtime_changes_memory_and_time_alone() -> None:
    one, four = (
        planned(
            "demo",
            **{"runtime.num_processes": ranks, "runtime.zero_stage": stage, "runtime.parallel": 1, "runtime.bucket_size": 10_000},
        )
        for ranks, stage in ((1, 0), (4, 2))
    )
    for single, several in zip(one.steps, four.steps, strict=True):
        assert (single.cost.flops, single.cost.teacher_flops, single.cost.params) == (
            several.cost.flops,
            several.cost.teacher_flops,
            several.cost.params,
        )
        if single.cost.steps:
            assert several.cost.memory_bytes < 0.65 * single.cost.memory_bytes
            assert several.seconds == pytest.approx(single.seconds / 4)
    total = sum(step.cost.flops + step.cost.teacher_flops for step in one.steps)
    assert one.seconds == pytest.approx(total / (GPU * 0.5))  # one step at a time: the sum


def test_kept_features_replace_the_teacher() -> None:
    off = {f"{key}.hidden": 0 for key in ("extraction.loss", "adaptation.loss", "baselines.distil_loss", "baselines.even_loss")}
    off |= {f"{key.removesuffix('.hidden')}.teacher_pool": "null" for key in off}
    found = steps_of("demo", **{"engine.keep_features": "true", "baselines.tleg": "null", **off})
    assert found["learngene"].cost.teacher_flops == found["i4-t4-distil"].cost.teacher_flops == 0
    flops = found["features"].cost.flops
    plain = steps_of("demo", **{"extraction.loss.teacher_pool": "null"})["learngene"].cost
    per_sample = plain.teacher_flops / (plain.steps * plain.batch_size)  # an image and a caption
    assert 20000 * per_sample < flops < 3 * 20000 * per_sample  # each image with its three captions
    assert found["learngene"].needs == ("data", "features")


def test_steps_wait_for_what_they_need() -> None:
    def step(name: str, length: float, *needs: str, state: str = "new") -> StepForecast:
        return StepForecast(name, needs, state, 0, StepCost(""), length)

    steps = [step("data", 0, state="kept"), step("a", 5, "data"), step("b", 2, "data"), step("c", 4, "b"), step("d", 1, "a", "c")]
    assert _until_the_end(steps, 1) == 12
    assert _until_the_end(steps, 2) == 7  # b then c beside a, then d
    assert _until_the_end(steps, 9) == 7


def test_the_largest_recipe_is_planned_without_building_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vit-l-14", "--json", "--flops-per-second", "989e12", "--runtime.num_processes", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    steps = {step["id"]: step for step in found["steps"]}
    assert steps["ancestor"]["params"] == pytest.approx(427.6e6, rel=1e-3)  # the README's
    assert steps["learngene"]["params"] == pytest.approx(72.7e6, rel=1e-3)
    assert steps["ancestor"]["flops"] == 100_000 * 4096 * training_flops(towers.model_config("ViT-L-14"))
    assert found["assumed"] == {"peak_flops": 989e12, "mfu": 0.4, "ranks": 8, "parallel": found["assumed"]["parallel"]}
    assert found["totals"]["flops"] == sum(step["flops"] for step in found["steps"])
    # One of 8 ranks at ZeRO 1: weights whole, an eighth of moments and copy, two buckets; activations before there are gradients.
    params, memory = steps["ancestor"]["params"], steps["ancestor"]["memory"]
    assert {key: memory[key] for key in ("weights", "gradients", "buffers", "optimizer")} == {
        "weights": 4 * params,
        "gradients": 0,
        "buffers": 2 * 4 * 25_000_000,
        "optimizer": 12 * params / 8,
    }
    assert memory["activations"] > 4 * params
    assert memory["loss"] == 4 * 4096 * 768 * 4  # both towers' features of the whole batch, and their gradients


SITE = "gpus_per_node: 4\ngpu_type: nvidia_h100_80gb\n"


def plan_on(site: str, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    """`mmlg plan --json` of vit-b-16 on two nodes of a cluster."""
    (folder / "site.yaml").write_text(site)
    assert main(["plan", "vit-b-16", "--json", "--cluster", str(folder / "site.yaml"), "--nodes", "2", *options]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_cluster_s_time_and_gpu_hours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of four GPUs: the FLOPs over what eight of them reach; GPU-hours do not depend on their number."""
    found = plan_on(SITE, tmp_path, capsys)
    hardware = found["assumed"]["hardware"]
    assert (hardware["ranks"], hardware["peak_flops"], hardware["memory_bytes"]) == (8, 989e12, 80e9)
    assert any(note.startswith("MFU: 40%, an assumption") for note in hardware["notes"])
    spent = 0.0
    for step in found["steps"]:
        flops = step["flops"] + step["teacher_flops"]
        assert step["seconds"] == pytest.approx(flops / (0.4 * 989e12 * step["ranks"]))
        assert step["device_hours"] == pytest.approx(flops / (0.4 * 989e12) / 3600)
        spent += step["seconds"]
    assert found["totals"]["seconds"] == pytest.approx(spent)  # one step at a time
    assert found["totals"]["device_hours"] == pytest.approx(sum(step["device_hours"] for step in found["steps"]))
    given = plan_on(SITE + "gpu_memory_gib: 96\n", tmp_path, capsys, "--mfu", "0.2", "--flops-per-second", "5e14")
    assert given["assumed"]["hardware"]["memory_bytes"] == 96 * 2**30
    assert given["totals"]["device_hours"] == pytest.approx(found["totals"]["device_hours"] * 2 * 989e12 / 5e14)


def test_mfu_is_taken_from_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same role, model and precision, on the number of ranks nearest to the plan's; said where it is of something else."""

    def row(
        role: str, mfu: float, ranks: int, model: str = "ViT-B-16", precision: str = "bf16", device: str = "NVIDIA H100"
    ) -> dict[str, Any]:
        return {"role": role, "mfu": mfu, "ranks": ranks, "model": model, "precision": precision, "environment": {"device": device}}

    rows = [
        row("ancestor", 0.5, 1),
        row("ancestor", 0.45, 16),
        row("ancestor", 0.6, 8, "ViT-L-14"),
        row("ancestor", 0.9, 8, precision="fp32"),
    ]
    rows += [
        row("extraction", 0.3, 8, device="NVIDIA A100"),
        {"role": "descendant", "precision": "bf16", "ranks": 8, "note": "out of memory"},
    ]
    file = tmp_path / "benchmark.json"
    write_record(file, {"rows": rows})
    found = plan_on(SITE, tmp_path, capsys, "--benchmark", str(file))
    assert found["assumed"]["hardware"]["mfu"] == {"ancestor": 0.45, "extraction": 0.3, "descendant": 0.3}
    notes = found["assumed"]["hardware"]["notes"]
    assert "MFU of ancestor steps: 45.0%, measured on 16 × NVIDIA H100, ViT-B-16." in notes
    assert any("NVIDIA A100, ViT-B-16; an assumption, since that is another device." in note for note in notes)
    assert any("of extraction steps, since there are none of their own" in note for note in notes)
    steps = {step["id"]: step for step in found["steps"]}
    assert steps["ancestor"]["seconds"] == pytest.approx(steps["ancestor"]["flops"] / (0.45 * 989e12 * 8))


@pytest.mark.parametrize(
    ("site", "options", "said"),
    [
        ("partition: gpu\n", (), "says nothing of GPUs. Give gpus_per_node, and gpu_type, in its file."),
        ("gpus_per_node: 4\n", (), "has no gpu_type. Give --flops-per-second"),
        ("gpus_per_node: 4\ngpu_type: mi300x\n", (), "has gpu_type mi300x, whose peak is not known here. Give --flops-per-second"),
        ("gpus: 4\n", (), "unknown key 'gpus'"),
        (SITE, ("--benchmark", "{folder}/none.json"), "none.json"),
        (SITE, ("--nodes", "0"), "nodes: 0 does not fit"),
    ],
)
def test_mistakes_of_a_cluster(site: str, options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text(site)
    words = [option.format(folder=tmp_path) for option in options]
    assert main(["plan", "vit-b-16", "--cluster", str(tmp_path / "site.yaml"), *words]) == 2
    assert said in capsys.readouterr().err


def test_what_does_not_fit_a_gpu_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text(SITE + "gpu_memory_gib: 8\n")
    assert main(["plan", "vit-b-16", "--cluster", str(tmp_path / "site.yaml")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Memory: ancestor" in printed
    assert "would take more than nine tenths of a GPU's 8.59 GB." in printed
    assert "GPU-hours (estimate): 1 step at a time, 4 ranks each, on nvidia_h100_80gb" in printed


def test_the_table_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--flops-per-second", "1e12"]) == 0
    said = capsys.readouterr().out
    assert "37 steps, 31.1 TFLOP in all" in said
    assert "650 × 128" in said
    assert main(["plan", "demo", "--family.sizes", "[{image_width: 17}]"]) == 2
    assert "recipe key family.sizes[0]" in capsys.readouterr().err
    assert main(["plan", "demo", "--mfu", "1.5"]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert main(["plan", "demo", "--out", str(tmp_path / "mine")]) == 2
    assert "is not an mmlg family: it contains notes.txt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]  # nothing is written

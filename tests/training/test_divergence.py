"""Runs that diverge: the loop's own line with step, rank and rate, soon, and nothing of them is saved or exported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from mmlg_scale import towers
from mmlg_scale.cli import main
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.pipeline import StreamSettings
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.runtime import Runtime
from mmlg_scale.training import loop
from mmlg_scale.training.engine import start_ranks, stop_ranks
from mmlg_scale.training.health import Health
from mmlg_scale.training.inputs import Inputs
from mmlg_scale.training.state import write_files
from mmlg_scale.training.step import compute_gradients
from tests.test_machine_errors import RECIPE, refused
from tests.training.ranks_worker import Case, make
from tests.training.tiny import batch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("divergence") / "data"
    write_scenes(root, num_train=64, num_val=8, num_test=8, seed=0, image_size=32)
    return root


def broken_after(step: int, how: Callable[[Any], None]) -> Callable[..., Any]:
    """`train_step` that does something to the model after a step."""
    original, calls = loop.train_step, 0

    def broken(stage: Any, engine: Any, batch: Any, number: int) -> Any:
        nonlocal calls
        found = original(stage, engine, batch, number)
        if number + 1 == step:
            with torch.no_grad():
                how(engine.model)
        return found

    return broken


def spoil(name: str, value: float) -> Callable[[Any], None]:
    return lambda model: next(tensor for key, tensor in model.named_parameters() if key.endswith(name)).fill_(value)


CASES = {
    # what becomes of the weights after step 2
    "a scale that is not a number": ("logit_scale", float("nan")),
    "an infinite weight": ("visual.proj", float("inf")),
    "a weight whose square overflows": ("visual.conv1.weight", 1e30),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_or_loss_that_are_no_numbers(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "runtime": {"log_every": 1, "checkpoint_every": 1}}))
    monkeypatch.setattr(loop, "train_step", broken_after(2, spoil(*CASES[case])))
    line = refused(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")], capsys)
    assert "training diverged: the weights are not finite, or beyond 1e19, after step 2 on rank 0, at learning rate " in line
    assert float(line.split("at learning rate ")[1].split(". ")[0]) > 0
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(text["step"] for text in lines if "loss" in text) == 1
    assert saved(tmp_path / "run") == ["step-00000001"]
    assert not (tmp_path / "run" / "result.json").exists()


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*") if path.is_dir())


def test_a_blow_up_in_the_last_step_is_neither_saved_nor_exported(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss, from before the update, is fine."""
    recipe = tmp_path / "recipe.yaml"
    rates = {"learning_rate": 1e30, "gradient_clipping": 0.0, "warmup_fraction": 0.0, "weight_decay": 0.0}
    recipe.write_text(yaml.safe_dump({**RECIPE, "ancestor": {**RECIPE["ancestor"], "steps": 1, "optimizer": rates}}))
    line = refused(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")], capsys)
    assert "training diverged: the weights are not finite, or beyond 1e19, after step 1 on rank 0" in line
    assert saved(tmp_path / "run") == []
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_weights_that_give_no_finite_loss_are_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However finite they are: before it is saved, the model computes the loss of the last batch once more."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    real = loop.compute_loss
    seen = []

    def checked(stage: Any, engine: Any, inputs: Any, step: int) -> torch.Tensor:
        seen.append((step, float(real(stage, engine, inputs, step))))
        return torch.tensor(float("inf") if step == 5 else 1.0)

    monkeypatch.setattr(loop, "compute_loss", checked)
    line = refused(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")], capsys)
    assert "the loss is not finite any more after the update of step 6 on rank 0" in line
    assert saved(tmp_path / "run") == ["step-00000003"]
    assert not (tmp_path / "run" / "model").exists()
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {text["step"]: text["loss"] for text in lines if "loss" in text}
    assert [step for step, _ in seen] == [2, 5]
    # After an update the loss of its batch is lower than before, which is what the log tells.
    assert 0 < seen[0][1] < losses[3]


def poisoned(steps: Sequence[int]) -> Callable[..., Any]:
    """`compute_gradients` whose loss is not a number in some steps (from 0), for which the gradients are fine."""
    original = loop.compute_gradients

    def compute(stage: Any, engine: Any, inputs: Any, step: int) -> Any:
        loss, terms = original(stage, engine, inputs, step)
        return (loss * float("nan") if step in steps else loss), terms

    return compute


def test_steps_that_are_not_finite_are_passed_over_and_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(loop, "compute_gradients", poisoned((1, 2, 4)))
    words = ["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run"), "--runtime.max_skipped_steps=2"]
    assert main(words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "changes nothing" in line]
    assert [line.split(" on rank")[0] for line in told] == [f"mmlg: the loss is not finite after step {step}" for step in (2, 3, 5)]
    stream = open_pairs(data)
    order = Corpus(stream, towers.load_clip(tmp_path / "run" / "model").spec).stream(StreamSettings(global_batch_size=16, seed=0))
    read, reader = list(itertools.islice(order, 5)), ShardReader(data / "train")
    for step, line in zip((1, 2, 4), told, strict=True):
        places = [reader.place(int(index)) for index in read[step].indices_B[:4]]
        keys = ", ".join(f"{place.shard.name}/{place.key}" for place in places)
        assert line.endswith(f"(samples {keys}, …): this step changes nothing.")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 3


def test_too_many_of_them_in_a_row_end_the_run_at_the_last_good_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    words = ["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run"), "--runtime.max_skipped_steps=1"]
    with monkeypatch.context() as patched:
        patched.setattr(loop, "compute_gradients", poisoned((3, 4)))
        line = refused(words, capsys)
    assert "training diverged: the loss is not finite after step 5 on rank 0 (samples " in line
    assert "1 steps before it were passed over (runtime.max_skipped_steps)" in line
    assert saved(tmp_path / "run") == ["step-00000003"]
    assert main(words) == 0


@pytest.mark.parametrize(
    ("zero_stage", "optimizer"),
    [
        (0, "adamw"),
        (0, "muon"),
        (2, "adamw"),
        (2, "muon"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, "adamw"), (1, "muon"), (3, "adamw")]),
    ],
)
def test_a_step_that_is_not_finite_changes_neither_weights_nor_moments(zero_stage: int, optimizer: str, tmp_path: Path) -> None:
    device = start_ranks(Runtime())
    try:
        stage, engine = make(Case("ancestor", zero_stage), device, optimizer)
        inputs = Inputs(*batch(0))

        def state(name: str) -> dict[str, torch.Tensor]:
            (tmp_path / name).mkdir()
            written = list(write_files(engine.copies(), tmp_path / name))
            return {f"{file.name} {key}": value for file in written for key, value in load_file(file).items()}

        def take(loss_factor: float, gradient_factor: float) -> dict[str, torch.Tensor]:
            hook = next(stage.model.parameters()).register_hook(lambda gradient: gradient * gradient_factor)
            loss, _ = compute_gradients(stage, engine, inputs, 0)
            hook.remove()
            engine.step(1.0, loss * loss_factor)
            return state(f"{loss_factor}-{gradient_factor}-{len(list(tmp_path.iterdir()))}")

        before = take(1, 1)
        assert {key.split(".")[1].split(" ")[0] for key in before} >= {"fp32", "step", "momentum" if optimizer == "muon" else "exp_avg"}
        for loss_factor, gradient_factor in ((float("nan"), 1), (1, float("inf")), (float("inf"), float("nan"))):
            after = take(loss_factor, gradient_factor)
            assert [key for key in before if not torch.equal(before[key], after[key])] == []
            assert engine.lost_R.tolist() == [loss_factor != 1]
            assert torch.as_tensor(engine.gradient_norm).isfinite() == (gradient_factor == 1)
        changed = take(1, 1)
        assert [key for key in before if torch.equal(before[key], changed[key])] == []
        engine.close()
    finally:
        stop_ranks()


def test_a_real_divergence_is_noticed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate at which the weights overflow by themselves."""
    recipe = tmp_path / "recipe.yaml"
    training = {**RECIPE["ancestor"], "steps": 30, "eval_every": 30}
    rates = {"learning_rate": 1e20, "gradient_clipping": 0.0, "warmup_fraction": 0.0}
    recipe.write_text(yaml.safe_dump({**RECIPE, "ancestor": {**training, "optimizer": rates}}))
    line = refused(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")], capsys)
    assert "training diverged: the " in line
    assert "on rank 0, at learning rate 1e+20" in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_scale_that_rounds_to_nothing_is_no_error_of_the_kernels(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exp(-200) is 0 in fp32, which the kernels refuse as a scale. The weights are numbers: training continues with equal similarities."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(loop, "train_step", broken_after(2, spoil("logit_scale", -200.0)))
    assert main(["train", str(recipe), "--data.path", str(data), "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [text["loss"] for text in lines if "loss" in text]
    assert losses[3:] == pytest.approx([float(torch.tensor(16.0).log())] * 3, rel=1e-5)


def test_a_look_is_taken_when_figures_are_logged_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looks nothing is read from the device; the first step that was lost is the one that is told."""
    engine: Any = SimpleNamespace(device=torch.device("cpu"), learning_rate=0.25)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = Health(engine, max_skipped=0)
        with monkeypatch.context() as patched:
            for read in ("item", "tolist", "__bool__", "__float__", "__int__"):
                patched.setattr(torch.Tensor, read, lambda *_: pytest.fail("a synchronisation"))
            for step, (lost, norm) in enumerate([(0, 1.0), (0, float("inf")), (1, 1.0)], start=1):
                engine.lost_R, engine.gradient_norm = torch.tensor([lost], dtype=torch.uint8), torch.tensor(norm)
                found.note(step, torch.tensor([7, 9]))
        with pytest.raises(
            UserError, match=r"the gradient norm is not finite after step 2 on rank 0 \(samples 7, 9\), at learning rate 0\.25"
        ):
            found.look()
    finally:
        dist.destroy_process_group()

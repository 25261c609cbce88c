"""The ancestor's outputs for a pool: those that it computes every step; once for each pair, on any ranks, whatever happens to the file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmlg_scale import files, recipe, towers
from mmlg_scale.cli import main
from mmlg_scale.data.corpus import open_pairs
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.runtime import Runtime, TextMode
from mmlg_scale.training.inputs import Inputs, inputs_of, text_length
from mmlg_scale.training.learngene_roles import ExtractionRole
from mmlg_scale.training.roles import DescendantRole
from mmlg_scale.training.run import run_role
from mmlg_scale.training.session import build_session
from mmlg_scale.training.stages import ExtractionStage
from mmlg_scale.training.teacher import LiveTeacher
from mmlg_scale.training.teacher_pool import Layout, PooledTeacher, PoolFile
from tests.forks import run_ranks

TRAIN, BATCH, POOL, STEPS = 48, 12, 36, 9
CPU = torch.device("cpu")
DEPTHS = (0.5, 1.0)
CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
}
LOSS = recipe.DistillationLoss(hidden_depths=list(DEPTHS), teacher_pool=POOL, teacher_pool_dtype="fp32")
RUNTIME = Runtime(log_every=1, trackers=["jsonl"], background_saves=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and an ancestor."""
    root = tmp_path_factory.mktemp("teacher-pool")
    write_scenes(root / "data", num_train=TRAIN, num_val=4, num_test=4, seed=0, image_size=32)
    towers.export(ancestor(root), root / "model")
    return root


def ancestor(root: Path) -> towers.Bundle:
    tokenizer = open_pairs(root / "data").tokenizer
    assert tokenizer is not None
    config = towers.model_config(CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"vocab_size": tokenizer.vocab_size}})
    return towers.Bundle(towers.ModelSpec(config, tokenizer=tokenizer), towers.build_clip(config, seed=3).state_dict())


def settings_for(root: Path, steps: int = STEPS, **loss: Any) -> recipe.Recipe:
    training = recipe.Training(steps=steps, batch_size=BATCH, eval_every=steps)
    return recipe.Recipe(
        data=recipe.Data(path=str(root / "data"), augment="crop"),
        model=recipe.Model(config=CONFIG),
        extraction=recipe.Extraction(min_layers=1, num_knots=2, start="random", training=training, loss=dataclasses.replace(LOSS, **loss)),
    )


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Counting(LiveTeacher):
    """Notes the size of every pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.computed: list[int] = []

    def __call__(self, inputs: Inputs, *rest: Any) -> dict[str, Any]:
        self.computed.append(len(inputs))
        return super().__call__(inputs, *rest)


def pages(row_bytes: int) -> int:
    """Bytes of whole pages: no two rows share one."""
    return math.ceil(row_bytes / 4096) * 4096


def pooled(root: Path, folder: Path, *, dtype: Any = "fp32", shard: bool = False) -> tuple[PooledTeacher, Counting]:
    model = ancestor(root)
    live = Counting(model, CPU, shard=shard)
    layout = Layout.of(model.spec.config, dataclasses.replace(LOSS, teacher_pool_dtype=dtype))
    return PooledTeacher(live, PoolFile(folder, layout, POOL)), live


def inputs(root: Path, text: TextMode = "cut", *, rank: int = 0, world_size: int = 1, steps: int = STEPS) -> list[Inputs]:
    spec = ancestor(root).spec
    settings = StreamSettings(global_batch_size=BATCH, seed=4, augment="crop", pool=POOL, rank=rank, world_size=world_size)
    stream = TrainStream(root / "data" / "train", spec, settings)
    return [inputs_of(batch, spec.preprocess, CPU, text=text) for batch in islice(stream, steps)]


def assert_close(found: dict[str, Any], expected: dict[str, Any], batch: Inputs) -> None:
    """Hidden states of text up to each caption's end token."""
    assert set(found) == set(expected)
    valid_BT = torch.arange(batch.text.shape[1]) <= batch.text.argmax(dim=-1, keepdim=True)
    for name, tensors in expected.items():
        for one, other in zip(found[name], tensors, strict=True) if isinstance(tensors, list) else [(found[name], tensors)]:
            valid = valid_BT if name == "text_hidden" else slice(None)
            assert one.shape == other.shape
            assert (one[valid].float() - other[valid]).norm() <= 1e-5 * other[valid].norm()


@pytest.mark.parametrize("text", ["cut", "full", "packed"])
def test_every_pass_reads_what_the_ancestor_computes(made: Path, tmp_path: Path, one_rank: None, text: TextMode) -> None:
    """Of pairs that come in other batches, of other lengths, and of patches that are chosen anew: patch dropout is not the ancestor's."""
    teacher, live = pooled(made, tmp_path)
    plain = LiveTeacher(ancestor(made), CPU)
    for step, batch in enumerate(inputs(made, text)):
        patches = torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(step)).topk(2).indices
        chosen = dataclasses.replace(batch, patches=patches if step % 2 else None)
        assert_close(teacher(chosen, nullcontext, DEPTHS), plain(chosen, nullcontext, DEPTHS), chosen)
    assert live.computed == [BATCH] * (POOL // BATCH)


def test_bf16_rounds_once_and_takes_half(made: Path, tmp_path: Path, one_rank: None) -> None:
    """What is compared at first is what is read later, bit for bit."""
    (teacher, _), (other, _) = pooled(made, tmp_path / "one", dtype="bf16"), pooled(made, tmp_path / "other")
    batch = inputs(made, steps=1)[0]
    first, again = (teacher(batch, nullcontext, DEPTHS) for _ in range(2))
    expected = LiveTeacher(ancestor(made), CPU)(batch, nullcontext, DEPTHS)
    for name in ("image_features", "text_features"):
        assert torch.equal(first[name], expected[name].bfloat16())
        assert torch.equal(first[name], again[name])
    assert all(torch.equal(one, two) for one, two in zip(first["text_hidden"], again["text_hidden"], strict=True))
    numbers = sum(math.prod(shape) for shape in teacher.file.layout.shapes.values())
    for file, size in ((teacher.file, 2), (other.file, 4)):
        assert file.layout.row_bytes == pages(32 + size * numbers)
    assert teacher.file.file.stat().st_size == POOL * teacher.file.layout.row_bytes


def test_rows_that_are_kept_are_flushed_by_every_rank(made: Path, tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS another node's rows are on the disk only when that node has written them back."""
    flushed = list[str]()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (flushed.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)))
    layout = Layout.of(ancestor(made).spec.config, LOSS)
    for name, kept_as, expected in (("kept", {"x": 1}, True), ("removed", None, False)):
        teacher = PooledTeacher(LiveTeacher(ancestor(made), CPU), PoolFile(tmp_path / name, layout, POOL, kept_as=kept_as))
        teacher(inputs(made, steps=1)[0], nullcontext, DEPTHS)
        flushed.clear()
        teacher.flush()
        assert flushed == ([str(teacher.file.file)] if expected else [])
        teacher.forget()
        assert teacher.file.file.exists() is expected


def test_reading_does_not_wait_for_the_device(made: Path, tmp_path: Path, one_rank: None) -> None:
    """Inputs whose images and captions are on a device without memory: nothing of them is read to find their rows."""
    teacher, live = pooled(made, tmp_path)
    batches = [inputs(made, text, steps=1)[0] for text in ("cut", "packed")]  # type: ignore[arg-type]
    expected = [teacher(batch, nullcontext, DEPTHS) for batch in batches]
    for batch, computed in zip(batches, expected, strict=True):
        found = teacher(batch.to(torch.device("meta")), nullcontext, DEPTHS)
        assert found["image_features"].device.type == "meta"
        assert found["image_features"].shape == computed["image_features"].shape
        assert [hidden.shape for hidden in found["text_hidden"]] == [hidden.shape for hidden in computed["text_hidden"]]
    assert live.computed == [BATCH]


def flipped(raw: bytearray, size: int) -> int:
    raw[size + 100] ^= 1
    return 1


def exchanged(raw: bytearray, size: int) -> int:
    raw[:size], raw[size : 2 * size] = raw[size : 2 * size], raw[:size]
    return 2


def torn(raw: bytearray, size: int) -> int:
    """As a crash of the machine leaves a row."""
    raw[2 * size + size // 2 : 3 * size] = bytes(size - size // 2)
    return 1


def cut(raw: bytearray, size: int) -> int:
    del raw[-size // 2 :]
    return 1


@pytest.mark.parametrize("damage", [flipped, exchanged, torn, cut])
def test_what_is_damaged_is_computed_again(made: Path, tmp_path: Path, one_rank: None, damage: Any) -> None:
    """While the file is open, so that nothing but the rows themselves can tell."""
    teacher, live = pooled(made, tmp_path)
    whole = inputs(made)[: POOL // BATCH]
    expected = [teacher(batch, nullcontext, DEPTHS) for batch in whole]
    raw = bytearray(teacher.file.file.read_bytes())
    rows = damage(raw, teacher.file.layout.row_bytes)
    teacher.file.file.write_bytes(raw)
    live.computed.clear()
    for _ in range(2):
        for batch, wanted in zip(whole, expected, strict=True):
            assert_close(teacher(batch, nullcontext, DEPTHS), wanted, batch)
    assert live.computed == [rows]


def other_layout(folder: Path) -> None:
    (folder / "layout.json").write_text('{"format": 1, "rows": 999999999999}\n')


def short_file(folder: Path) -> None:
    (folder / "rows.bin").write_bytes(b"12345")


def link_elsewhere(folder: Path) -> None:
    (folder / "rows.bin").rename(folder.parent / "elsewhere")
    (folder / "rows.bin").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("damage", [other_layout, short_file, link_elsewhere])
def test_a_file_that_is_not_this_pools_is_made_anew(made: Path, tmp_path: Path, one_rank: None, damage: Any) -> None:
    teacher, _ = pooled(made, tmp_path)
    batch = inputs(made, steps=1)[0]
    teacher(batch, nullcontext, DEPTHS)
    damage(teacher.file.folder)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    again, live = pooled(made, tmp_path)
    again(batch, nullcontext, DEPTHS)
    assert live.computed == [BATCH]
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}  # nothing was written elsewhere


def _rank(rank: int, root: str, folder: str, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    made, plain = Path(root), LiveTeacher(ancestor(Path(root)), CPU)
    teacher, live = pooled(made, Path(folder))
    own = inputs(made, rank=rank, world_size=2)
    for batch in own:
        assert_close(teacher(batch, nullcontext, DEPTHS), plain(batch, nullcontext, DEPTHS), batch)
        dist.barrier()  # as the exchange of gradients is
    assert live.computed == [BATCH // 2] * (POOL // BATCH), live.computed  # the other half was the other rank's
    dist.barrier()
    sharded, live = pooled(made, Path(folder), shard=True)
    if rank == 0:  # only one rank lacks a row, of an ancestor that all have to compute
        with open(sharded.file.file, "r+b") as file:
            file.seek(int(own[0].places[0]) * sharded.file.layout.row_bytes + 50)  # type: ignore[index]
            file.write(b"damage")
    for batch in own[:2]:
        assert_close(sharded(batch, nullcontext, DEPTHS), plain(batch, nullcontext, DEPTHS), batch)
    assert live.computed == [1], live.computed
    dist.destroy_process_group()


def test_ranks_share_the_rows_and_any_number_resumes(made: Path, tmp_path: Path, one_rank: None) -> None:
    run_ranks(_rank, (str(made), str(tmp_path), str(tmp_path / "store")), 2)
    teacher, live = pooled(made, tmp_path)
    plain = LiveTeacher(ancestor(made), CPU)
    for batch in inputs(made):
        assert_close(teacher(batch, nullcontext, DEPTHS), plain(batch, nullcontext, DEPTHS), batch)
    assert live.computed == []


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_losses_and_costs_of_a_run(made: Path, tmp_path: Path) -> None:
    """Three passes: losses of an ancestor that computes in every step, its FLOPs of the first pass only, and nothing left on the disk."""
    settings = settings_for(made)
    result = run_role(ExtractionRole(settings, made / "model"), tmp_path / "run", RUNTIME)
    session = build_session(settings, ExtractionRole(settings, made / "model"), runtime=RUNTIME)
    teacher = session.stage.teacher
    assert isinstance(teacher, LiveTeacher)
    expected, first_pass = [], 0
    for step, batch in enumerate(islice(session.stream(), STEPS)):
        expected.append(session.train_step(batch, step).item())
        first_pass += BATCH * teacher.flops(DEPTHS, text_length(batch, "cut")) if step < POOL // BATCH else 0
    session.close()
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-6)
    assert result["teacher_flops"] == first_pass > 0
    assert not (tmp_path / "run" / "teacher-pool").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_that_is_stopped_in_a_pass_gets_the_same_numbers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """Stopped in the second step and in the second pass, two steps after a checkpoint: the same learngene and costs, bit for bit."""
    role = ExtractionRole(settings_for(made, teacher_pool_dtype=dtype), made / "model")
    runtime = dataclasses.replace(RUNTIME, checkpoint_every=3)
    straight = run_role(role, tmp_path / "straight", runtime)
    flops, stops = ExtractionStage.flops, [1, 5]

    def stop(stage: ExtractionStage, step: int, *rest: Any) -> Any:
        if stops and step == stops[0]:
            stops.pop(0)
            raise UserError("stopped by the test")
        return flops(stage, step, *rest)

    monkeypatch.setattr(ExtractionStage, "flops", stop)
    for _ in range(2):
        with pytest.raises(UserError, match="stopped by the test"):
            run_role(role, tmp_path / "stopped", runtime)
        assert (tmp_path / "stopped" / "teacher-pool" / "rows.bin").exists()
    resumed = run_role(role, tmp_path / "stopped", runtime)
    assert {key: resumed[key] for key in ("sha256", "flops", "teacher_flops")} == {
        key: straight[key] for key in ("sha256", "flops", "teacher_flops")
    }
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")


def test_separate_distillation_has_it_too(made: Path, tmp_path: Path) -> None:
    settings = settings_for(made)
    settings.baselines.distil = recipe.Training(steps=STEPS, batch_size=BATCH, eval_every=STEPS)
    found = []
    for pool in (POOL, None):
        settings.baselines.distil_loss = dataclasses.replace(LOSS, teacher_pool=pool)
        role = DescendantRole(settings, "distil", recipe.Size(2, 2), ancestor=made / "model")
        found.append(run_role(role, tmp_path / str(pool), RUNTIME))
    assert losses(tmp_path / str(POOL))[: POOL // BATCH] == pytest.approx(losses(tmp_path / "None")[: POOL // BATCH], rel=1e-6)
    assert found[0]["teacher_flops"] < 0.4 * found[1]["teacher_flops"]


def test_what_does_not_fit_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the budget, before a run or a family; by the disk. A row: 2 x 8 numbers of features, 2 x (5 + 16) tokens of 16, a header."""
    settings, row = settings_for(made), pages(4 * (2 * 8 + 2 * (5 + 16) * 16) + 32)
    role = ExtractionRole(settings, made / "model")
    small = dataclasses.replace(RUNTIME, teacher_pool_bytes=POOL * row - 1)
    said = (
        rf"recipe key extraction\.loss\.teacher_pool: 36 pairs take {POOL * row:,} bytes \({row:,} each\), runtime\.teacher_pool_bytes is"
    )
    with pytest.raises(UserError, match=said):
        run_role(role, tmp_path / "budget", small)
    with monkeypatch.context() as patched:
        patched.setattr(files, "free_bytes", lambda folder: POOL * row - 1)
        with pytest.raises(UserError, match="the ancestor's outputs for teacher_pool needs"):
            run_role(role, tmp_path / "disk", RUNTIME)
    assert main(["plan", "demo", "--extraction.loss.teacher_pool=2400", "--runtime.teacher_pool_bytes=1000"]) == 2
    assert "2,400 pairs take" in capsys.readouterr().err
    assert main(["plan", "demo", "--extraction.loss.teacher_pool=2401"]) == 2
    assert "recipe key extraction.loss.teacher_pool: 2401 is not a multiple of batch_size 8. Use 2408." in capsys.readouterr().err


def test_the_plan_charges_each_pair_once(capsys: pytest.CaptureFixture[str]) -> None:
    def learngene(*words: str) -> dict[str, Any]:
        assert main(["plan", "demo", "--json", "--flops-per-second=1e9", *words]) == 0
        return next(step for step in json.loads(capsys.readouterr().out)["steps"] if step["id"] == "learngene")

    plain, pool = learngene("--extraction.loss.teacher_pool=null"), learngene("--extraction.loss.teacher_pool=2400")
    assert pool["teacher_flops"] * 19_200 == plain["teacher_flops"] * 2400
    assert pool["flops"] == plain["flops"]
    # Features of 2 x 64 numbers, 17 + 16 tokens of width 64 at four depths, in bf16, with a header.
    assert pool["checkpoint_bytes"] - plain["checkpoint_bytes"] == 2400 * pages(2 * (2 * 64 + 4 * 33 * 64) + 32)
    assert learngene("--extraction.loss.teacher_pool=19200")["checkpoint_bytes"] == plain["checkpoint_bytes"]  # no pair comes twice


def reusing(root: Path, **adaptation: Any) -> recipe.Recipe:
    """Extraction of 36 of 48 pairs in three passes, and an adaptation of four steps, into a second pass of its 24 pairs."""
    settings = settings_for(root)
    loss = dataclasses.replace(LOSS, teacher_pool=24)
    training = recipe.Training(steps=4, batch_size=BATCH, eval_every=4)
    settings.adaptation = recipe.Adaptation(training, loss, **({"reuse_teacher_pool": True} | adaptation))
    return settings


def adapted(settings: recipe.Recipe, root: Path, folder: Path) -> DescendantRole:
    learngene = folder / "learngene.safetensors"
    return DescendantRole(settings, "mmlg", recipe.Size(2, 2), ancestor=root / "model", learngene=learngene)


@pytest.mark.parametrize("hidden", [1.0, 0.0])
def test_the_adaptation_reuses_what_extraction_kept(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: float) -> None:
    """The losses of an adaptation whose ancestor runs, without one, at the student's cost. Extraction is the same run either way."""
    settings, plain = reusing(made), reusing(made, reuse_teacher_pool=False)
    for each in (settings, plain):
        each.adaptation.loss.hidden = hidden
        each.check()
    one, other = (
        run_role(ExtractionRole(each, made / "model"), tmp_path / name, RUNTIME) for each, name in ((settings, "kept"), (plain, "plain"))
    )
    assert {key: one[key] for key in ("sha256", "flops", "teacher_flops")} == {
        key: other[key] for key in ("sha256", "flops", "teacher_flops")
    }
    assert (tmp_path / "kept" / "teacher-pool").exists()
    assert not (tmp_path / "plain" / "teacher-pool").exists()
    expected = run_role(adapted(plain, made, tmp_path / "plain"), tmp_path / "computed", RUNTIME)
    with monkeypatch.context() as patched:
        patched.setattr("mmlg_scale.training.roles.LiveTeacher", None)  # no ancestor is made
        found = run_role(adapted(settings, made, tmp_path / "kept"), tmp_path / "reused", RUNTIME)
    assert losses(tmp_path / "reused") == pytest.approx(losses(tmp_path / "computed"), rel=1e-6)
    assert found["flops"] == expected["flops"]
    assert found["teacher_flops"] == 0 < expected["teacher_flops"]
    assert (tmp_path / "kept" / "teacher-pool").exists()  # for the next size


def _run_rank(rank: int, store: str, root: str, folder: str, learngene: str | None) -> None:
    """Extraction, or with a learngene its descendant's adaptation, on two ranks."""
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    settings, made = reusing(Path(root)), Path(root)
    role = ExtractionRole(settings, made / "model") if learngene is None else adapted(settings, made, Path(learngene))
    run_role(role, Path(folder), RUNTIME)


def test_two_ranks_keep_and_reuse_what_one_does(made: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_role(ExtractionRole(reusing(made), made / "model"), one, RUNTIME)
    run_ranks(_run_rank, (str(tmp_path / "first"), str(made), str(two), None), 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    # Out of the same learngene, adapted by each number of ranks with what the other one kept.
    shutil.copy(one / "learngene.safetensors", two / "learngene.safetensors")
    run_role(adapted(reusing(made), made, two), tmp_path / "by-one", RUNTIME)
    run_ranks(_run_rank, (str(tmp_path / "second"), str(made), str(tmp_path / "by-two"), str(one)), 2)
    assert losses(tmp_path / "by-two") == pytest.approx(losses(tmp_path / "by-one"), rel=1e-5)


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def cut_short(folder: Path) -> None:
    os.truncate(folder / "rows.bin", 100)


def flip(folder: Path) -> None:
    raw = bytearray((folder / "rows.bin").read_bytes())
    raw[200] ^= 1
    (folder / "rows.bin").write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "changes", "said"),
    [
        (removed, {}, "teacher-pool is not there: this learngene's extraction kept none of the ancestor's outputs. Extract again with"),
        (cut_short, {}, r"rows\.bin has 100 bytes and should have [\d,]+: it is damaged"),
        (flip, {}, r"rows\.bin: row 0 is damaged, or not of sample \d+ and caption 0"),
        (None, {"seed": 1}, "teacher-pool has other outputs than this run compares with: seed was 0, now 1"),
        (None, {"data.augment": "none"}, "data.augment was .crop., now .none."),
        (None, {"extraction.loss.teacher_pool": 24}, "the recipe's extraction.loss asks for others"),
    ],
)
def test_outputs_that_are_not_what_extraction_kept_are_refused(
    made: Path, tmp_path: Path, damage: Any, changes: dict[str, Any], said: str
) -> None:
    settings = reusing(made)
    run_role(ExtractionRole(settings, made / "model"), tmp_path / "learngene", RUNTIME)
    if damage is not None:
        damage(tmp_path / "learngene" / "teacher-pool")
    for key, value in changes.items():
        *sections, name = key.split(".")
        setattr(functools.reduce(getattr, sections, settings), name, value)
    with pytest.raises(UserError, match=said):
        run_role(adapted(settings, made, tmp_path / "learngene"), tmp_path / "adapted", RUNTIME)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--adaptation.loss.teacher_pool=null"], "adaptation.loss.teacher_pool: is null beside adaptation.reuse_teacher_pool"),
        (
            ["--extraction.loss.teacher_pool=1600"],
            "adaptation.loss.teacher_pool: 2400 pairs are to be reused, extraction.loss keeps the outputs of 1600",
        ),
        (["--extraction.training.steps=200"], "extraction.loss keeps the outputs of 1600"),
        (["--baselines.tleg.loss.teacher_pool=null"], "baselines.tleg.loss keeps the outputs of 0"),
        (["--adaptation.loss.teacher_pool_dtype=fp32"], "adaptation.loss.teacher_pool_dtype: is not extraction.loss's bf16"),
        (["--extraction.loss.hidden=0"], "adaptation.loss.hidden_depths: are to be reused, extraction.loss keeps hidden states at []"),
    ],
)
def test_a_recipe_whose_extraction_keeps_other_outputs_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--adaptation.reuse_teacher_pool=true", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_plan_of_a_reused_pool(capsys: pytest.CaptureFixture[str]) -> None:
    """No pass of the ancestor in the adaptation, and no ancestor in memory; the outputs stay beside the learngene."""

    def steps(reuse: bool) -> dict[str, Any]:
        words = ["plan", "demo", "--json", "--flops-per-second=1e9", f"--adaptation.reuse_teacher_pool={str(reuse).lower()}"]
        assert main(words) == 0
        return {step["id"]: step for step in json.loads(capsys.readouterr().out)["steps"]}

    plain, reused = steps(False), steps(True)
    name = next(name for name in plain if name.endswith("-mmlg") and plain[name]["steps"])
    assert plain[name]["teacher_flops"] > 0 == reused[name]["teacher_flops"]
    assert reused[name]["memory"] == {key: value for key, value in plain[name]["memory"].items() if key != "ancestor"}
    pool = 4800 * pages(2 * (2 * 64 + 4 * 33 * 64) + 32)
    assert reused["learngene"]["export_bytes"] - plain["learngene"]["export_bytes"] == pool
    assert plain["learngene"]["checkpoint_bytes"] - reused["learngene"]["checkpoint_bytes"] == pool
    assert reused["learngene"]["teacher_flops"] == plain["learngene"]["teacher_flops"]

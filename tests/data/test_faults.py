"""Damaged data: every intact sample is read exactly once an epoch, every damaged one is counted under its cause, nothing hangs."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmlg_scale.data.evaluation import load_eval_split
from mmlg_scale.data.faults import EpochReport, FaultLog
from mmlg_scale.data.pipeline import Batch, StreamSettings, TrainStream
from mmlg_scale.data.reader import CUT, ENCODING, HEADER, IMAGE, JSON, MISSING, READ, DamagedSample, Fault, ShardReader
from mmlg_scale.data.scan import CACHE_FILE, Findings, num_threads, scan
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.records import KEY
from tests.data.damage import KINDS
from tests.data.specs import spec_for
from tests.forks import run_ranks

NUM, PER_SHARD, BATCH = 60, 12, 10


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "scenes"
    write_scenes(root, num_train=NUM, num_val=10, num_test=10, seed=4, samples_per_shard=PER_SHARD)
    return root


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "set"))


def stream(root: Path, **options: object) -> TrainStream:
    own = {key: options.pop(key) for key in ("start_step", "record", "on_epoch") if key in options}
    settings = StreamSettings(**{"global_batch_size": BATCH, "seed": 5, "max_bad_fraction": 1.0, **options})  # type: ignore[arg-type]
    return TrainStream(root / "train", spec_for(root), settings, **own)  # type: ignore[arg-type]


def flatten(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def read(root: Path, num_steps: int, *, ranks: int = 1, start_step: int = 0, **options: object) -> list[list[int]]:
    """The samples of each step, ranks one after the other."""
    parts = [stream(root, rank=rank, world_size=ranks, start_step=start_step, **options) for rank in range(ranks)]
    each = [[batch.indices_B.tolist() for batch in islice(part, num_steps)] for part in parts]
    assert all(len(step) == BATCH // ranks for part in each for step in part)
    return [flatten(step) for step in zip(*each, strict=True)]


def assert_epochs(steps: list[list[int]], intact: set[int]) -> None:
    """As far as the steps go, each epoch is the intact samples, each once."""
    flat, size = flatten(steps), len(intact)
    assert len(flat) >= size
    for start in range(0, len(flat) - size + 1, size):
        assert sorted(flat[start : start + size]) == sorted(intact)
    rest = flat[len(flat) // size * size :]
    assert len(set(rest)) == len(rest)
    assert set(rest) <= intact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 5, PER_SHARD - 1])
def test_fault_matrix(kind: str, position: int, copy: Path, tmp_path: Path) -> None:
    """Each kind of damage x position in the shard x ranks 1 and 2; with workers below."""
    damage, cause = KINDS[kind]
    shard = {0: 2, 5: 0, PER_SHARD - 1: 3}[position]
    lost = {shard * PER_SHARD + lost for lost in damage(copy / "train", shard, position)}
    intact = set(range(NUM)) - lost
    reports: list[EpochReport] = []
    one = read(copy, 12, record=tmp_path / "run", on_epoch=reports.append)
    assert_epochs(one, intact)
    assert one == read(copy, 12, ranks=2)
    epochs = 12 * BATCH // len(intact)
    assert [(report.epoch, report.skipped, report.num_intact) for report in reports] == [
        (epoch, {cause: len(lost)}, len(intact)) for epoch in range(epochs)
    ]
    listed = [json.loads(line) for line in (tmp_path / "run" / "data-faults-rank0.jsonl").read_text().splitlines()]
    # A key is read from the tar; where that is not there, the sample's number in the shard takes its place.
    gone = lost - {shard * PER_SHARD + position} if kind == "shard cut" else lost if kind == "shard missing" else set()
    keys = {index: f"#{index % PER_SHARD}" if index in gone else f"{index:08d}" for index in lost}
    assert [(line["index"], line["key"], line["cause"]) for line in listed] == [(index, keys[index], cause) for index in sorted(lost)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 5, PER_SHARD - 1])
def test_fault_matrix_with_workers(kind: str, position: int, copy: Path) -> None:
    """The same with two workers, on one rank and on two."""
    damage, _ = KINDS[kind]
    shard = {0: 2, 5: 0, PER_SHARD - 1: 3}[position]
    lost = {shard * PER_SHARD + lost for lost in damage(copy / "train", shard, position)}
    alone = read(copy, 12)
    assert_epochs(alone, set(range(NUM)) - lost)
    assert read(copy, 12, num_workers=2) == alone
    assert read(copy, 12, ranks=2, num_workers=2) == alone


@pytest.fixture
def damaged(copy: Path) -> tuple[Path, dict[int, str]]:
    """A set with every kind of damage, and the cause of each lost sample."""
    expected = {}
    places = {"shard cut": (3, 8), "shard missing": (4, 0)}
    others = [kind for kind in KINDS if kind not in places]
    places |= {kind: (number % 3, (0, 5, PER_SHARD - 1)[number // 3]) for number, kind in enumerate(others)}
    for kind, (shard, position) in places.items():
        damage, cause = KINDS[kind]
        expected |= {shard * PER_SHARD + lost: cause for lost in damage(copy / "train", shard, position)}
    assert set(expected.values()) == {CUT, ENCODING, HEADER, IMAGE, JSON, MISSING}
    return copy, expected


def test_workers_change_nothing_and_all_damage_at_once_is_told_apart(damaged: tuple[Path, dict[int, str]]) -> None:
    root, expected = damaged
    found = scan(root / "train", ShardReader(root / "train"), fresh=True, threads=3)
    assert {fault.index: fault.cause for fault in found} == expected
    alone = read(root, 10)
    assert_epochs(alone, set(range(NUM)) - set(expected))
    assert read(root, 10, num_workers=2) == alone
    assert read(root, 4, start_step=6) == alone[6:]


def _rank(rank: int, port: int, root: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = stream(Path(root), rank=rank, world_size=2, num_workers=2 * rank, record=Path(out))
    steps = [batch.indices_B.tolist() for batch in islice(part, 10)]
    (Path(out) / f"{rank}.json").write_text(json.dumps(steps))
    errors = []
    for options in ({"record": Path(out) / "damaged"}, {"max_bad_fraction": 0.01}):
        with pytest.raises(UserError) as raised:
            stream(Path(root), rank=rank, world_size=2, **options)
        errors.append(str(raised.value))
    dist.barrier()
    index = Path(root) / "train" / "index" / "shard-000001.npy"
    if rank == 0:
        index.rename(index.with_suffix(".away"))
    dist.barrier()
    with pytest.raises(UserError, match=r"no index .*shard-000001\.npy"):
        scan(Path(root) / "train", ShardReader(Path(root) / "train"), shared=True, fresh=True)
    dist.barrier()
    if rank == 0:
        index.with_suffix(".away").rename(index)
    (Path(out) / f"{rank}.errors").write_text(json.dumps(errors))
    dist.destroy_process_group()


def test_two_processes_share_the_scan(damaged: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    root, expected = damaged
    out = tmp_path / "run"
    (out / "damaged").mkdir(parents=True)
    (out / "damaged" / "data-skipped.json").write_text("{")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(_rank, (port, str(root), str(out)), 2)
    halves = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    joined = [left + right for left, right in zip(*halves, strict=True)]
    assert joined == read(root, 10)
    assert_epochs(joined, set(range(NUM)) - set(expected))
    assert len((out / "data-faults-rank0.jsonl").read_text().splitlines()) == len(expected)
    cached = json.loads((root / "train" / CACHE_FILE).read_text())["shards"]
    errors = [json.loads((out / f"{rank}.errors").read_text()) for rank in (0, 1)]
    assert errors[0] == errors[1]  # none is left waiting for the other
    assert "data-skipped.json is damaged" in errors[0][0]
    assert f"{len(expected)} damaged samples" in errors[0][1]
    missing = list(expected.values()).count(MISSING)  # not kept: it may come back
    assert sum(len(state["faults"]) for state in cached.values()) == len(expected) - missing  # of both ranks' shards


def test_above_the_limit_the_run_stops_with_the_list(damaged: tuple[Path, dict[int, str]], tmp_path: Path) -> None:
    root, expected = damaged
    share = len(expected) / NUM
    stream(root, max_bad_fraction=share)
    with pytest.raises(UserError) as stopped:
        stream(root, max_bad_fraction=share - 0.01, record=tmp_path / "run")
    message = str(stopped.value)
    assert f"{len(expected)} damaged samples" in message
    for cause in set(expected.values()):
        assert f"{cause} {list(expected.values()).count(cause)}" in message
    assert "shard-000000.tar sample 00000000: tar header" in message
    assert f"Full list: {tmp_path / 'run' / 'data-faults-rank0.jsonl'}" in message
    assert len((tmp_path / "run" / "data-faults-rank0.jsonl").read_text().splitlines()) == len(expected)


def test_a_rank_of_many_does_not_end_the_run_by_chance(copy: Path) -> None:
    """Of 200,000 samples half of the limit are damaged: of 512 ranks, many meet more than a 512th of the limit, and none ends the run."""
    samples, ranks, rng = 200_000, 512, np.random.default_rng(0)
    met = rng.multinomial(samples // 200, np.full(ranks, 1 / ranks))
    assert (met > 0.01 * samples / ranks).sum() > 10
    known = Findings(ShardReader(copy / "train"), {})

    def log(share: float) -> FaultLog:
        options = {"file": None, "context_length": 8, "on_epoch": print, "what": "train"}
        return FaultLog(known, samples, share=share, max_bad_fraction=0.01, **options)  # type: ignore[arg-type]

    def faults(number: int) -> list[Fault]:
        return [Fault("shard-000000.tar", str(index), index, IMAGE, "") for index in range(number)]

    for number in met:
        log(1 / ranks).add(0, 1, faults(number))
    said = r"train, epoch 0, a rank's part of 391 samples: 12 damaged samples \(.* 12\) are more than data.max_bad_fraction 0.01 of them"
    with pytest.raises(UserError, match=said):
        log(1 / ranks).add(0, 1, faults(12))
    log(1.0).add(0, 1, faults(2000))
    with pytest.raises(UserError, match="train, epoch 0: 2001 damaged samples"):
        log(1.0).add(0, 1, faults(2001))


@pytest.mark.parametrize(
    ("environment", "cores"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "8"}, 8),  # bound to its own
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "2"}, 2),  # not bound
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "8"}, 2),  # all in one task
    ],
)
def test_the_cores_of_a_rank(environment: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert num_threads() == cores


def test_default_limit_is_one_percent(copy: Path) -> None:
    KINDS["json cut"][0](copy / "train", 0, 0)
    with pytest.raises(UserError, match=r"1 damaged samples \(unreadable JSON 1\) are more than data.max_bad_fraction 0.01"):
        TrainStream(copy / "train", spec_for(copy), StreamSettings(global_batch_size=BATCH, seed=0))


def test_the_skipped_set_survives_a_resume(copy: Path, tmp_path: Path) -> None:
    """A shard that comes back between two starts of a run changes none of its batches."""
    shard = copy / "train" / "shard-000001.tar"
    shard.rename(tmp_path / "away")
    whole = read(copy, 9, record=tmp_path / "run")
    (tmp_path / "away").rename(shard)
    assert read(copy, 5, start_step=4, record=tmp_path / "run") == whole[4:]
    assert read(copy, 9, record=tmp_path / "afresh") != whole
    (tmp_path / "run" / "data-skipped.json").write_text("{")
    with pytest.raises(UserError, match=r"data-skipped.json is damaged"):
        stream(copy, record=tmp_path / "run")


def break_between(root: Path, kind: str, num_workers: int, **options: object) -> tuple[list[Batch], list[EpochReport], set[int]]:
    """Two epochs of a stream whose data breaks after it was checked."""
    reports: list[EpochReport] = []
    part = stream(root, on_epoch=reports.append, num_workers=num_workers, **options)
    lost = {PER_SHARD + position for position in KINDS[kind][0](root / "train", 1, 7)}
    return list(islice(part, 2 * NUM // BATCH)), reports, lost


@pytest.mark.parametrize(
    ("kind", "num_workers"), [("image cut", 0), ("image cut", 1), ("json cut", 0), ("shard cut", 0), ("shard missing", 0)]
)
def test_what_breaks_later_is_replaced_and_counted(kind: str, num_workers: int, original: Path, tmp_path: Path) -> None:
    outcomes = []
    for name in ("a", "b"):
        root = Path(shutil.copytree(original, tmp_path / name))
        outcomes.append(break_between(root, kind, num_workers))
    batches, reports, lost = outcomes[0]
    healthy = list(islice(stream(original), 2 * NUM // BATCH))
    for position, (batch, right) in enumerate(zip(batches, healthy, strict=True)):
        assert torch.equal(batch.indices_B, outcomes[1][0][position].indices_B)
        assert torch.equal(batch.image_uint8_BCHW, outcomes[1][0][position].image_uint8_BCHW)
        for row, index in enumerate(right.indices_B.tolist()):
            if index in lost:
                assert int(batch.indices_B[row]) not in lost
            else:
                assert int(batch.indices_B[row]) == index
                assert torch.equal(batch.image_uint8_BCHW[row], right.image_uint8_BCHW[row])
    cause = KINDS[kind][1]
    assert [report.epoch for report in reports] == [0, 1]
    for report in reports:
        assert set(report.skipped) == {cause}
        assert report.skipped[cause] >= len(lost)  # a substitute may be damaged too


def test_what_breaks_later_counts_towards_the_limit(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train, epoch 0: \d+ damaged samples \(missing shard \d+\) are more than .* 0.05"):
        break_between(copy, "shard missing", 0, max_bad_fraction=0.05, record=tmp_path)
    assert 3 <= len((tmp_path / "data-faults-rank0.jsonl").read_text().splitlines()) <= 5 + BATCH


def test_without_decoding_images_are_found_when_they_are_read(copy: Path) -> None:
    KINDS["image cut"][0](copy / "train", 1, 7)
    reports: list[EpochReport] = []
    steps = read(copy, NUM // BATCH, check="structure", on_epoch=reports.append)
    assert PER_SHARD + 7 not in flatten(steps)
    assert len(set(flatten(steps))) == NUM - 1
    assert reports == [EpochReport(0, NUM, {IMAGE: 1}, None, num_captions=NUM, num_truncated=0, context_length=16)]
    assert json.loads((copy / "train" / CACHE_FILE).read_text())["shards"]["shard-000001.tar"]["decode"] is False
    assert next(iter(scan(copy / "train", ShardReader(copy / "train")))).index == PER_SHARD + 7  # decoding looks again
    with pytest.raises(UserError, match=r"data.check 'none' is unknown"):
        stream(copy, check="none")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable_stops_with_one_line_instead_of_hanging(copy: Path, num_workers: int) -> None:
    part = stream(copy, num_workers=num_workers)
    for shard in (copy / "train").glob("*.tar"):
        shard.unlink()
    with pytest.raises(UserError) as stopped:
        next(iter(part))
    assert str(stopped.value).startswith("100 samples in a row cannot be read, the last being")
    assert "\n" not in str(stopped.value)
    with pytest.raises(UserError, match=r"data.max_bad_fraction is 1.5"):
        stream(copy, max_bad_fraction=1.5)


def test_checked_once_until_a_shard_changes(copy: Path) -> None:
    split = copy / "train"
    reader = ShardReader(split)

    def look(**options: bool) -> list[Fault]:
        return list(scan(split, reader, **options))

    assert look() == []
    cache = json.loads((split / CACHE_FILE).read_text())
    for state in cache["shards"].values():
        state["faults"] = [[0, 1, IMAGE, "as remembered"]]
    del cache[KEY]
    (split / CACHE_FILE).write_text(json.dumps(cache))
    assert [fault.detail for fault in look()] == ["as remembered"] * 5
    KINDS["json cut"][0](split, 2, 4)
    found = look()
    assert [(fault.index, fault.cause) for fault in found] == [(0, IMAGE), (12, IMAGE), (28, JSON), (36, IMAGE), (48, IMAGE)]
    assert len(look(fresh=True)) == 1
    (split / CACHE_FILE).write_text("{")
    assert len(look()) == 1


def test_storage_that_fails_is_not_remembered(copy: Path) -> None:
    split = copy / "train"
    shard = split / "shard-000001.tar"
    shard.rename(split / "away")
    shard.mkdir()  # a read of a folder fails as a read of a bad disk does
    assert {fault.cause for fault in scan(split, ShardReader(split))} == {READ}
    kept = json.loads((split / CACHE_FILE).read_text())["shards"]
    assert sorted(kept) == [f"shard-{number:06d}.tar" for number in (0, 2, 3, 4)]
    shard.rmdir()
    assert {fault.cause for fault in scan(split, ShardReader(split))} == {MISSING}
    (split / "away").rename(shard)
    assert len(scan(split, ShardReader(split))) == 0


def test_an_evaluation_leaves_damage_out_and_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_eval_split(copy / "test", spec_for(copy))
    images_NCHW = whole.images_uint8_NCHW()
    KINDS["image cut"][0](copy / "test", 0, 3)
    with pytest.raises(UserError, match="1 damaged samples"):
        load_eval_split(copy / "test", spec_for(copy))
    part = load_eval_split(copy / "test", spec_for(copy), max_bad_fraction=0.1)
    assert [(fault.index, fault.cause) for fault in part.skipped] == [(3, IMAGE)]
    kept = [index for index in range(10) if index != 3]
    assert torch.equal(part.images_uint8_NCHW(), images_NCHW[kept])
    assert part.text_to_image_M.tolist() == [index for index in range(9) for _ in range(2)]
    assert list(part.captions) == [text for position, text in enumerate(whole.captions) if position not in (6, 7)]
    assert "left out of the evaluation" in capsys.readouterr().out


def test_fuzzed_images_decode_or_are_damaged(copy: Path) -> None:
    """Whatever is written over an image, reading it gives an image or names the sample; never another error."""
    split = copy / "train"
    place = ShardReader(split).place(5)
    original, generator = place.shard.read_bytes(), np.random.default_rng(0)
    outcomes = []
    for _ in range(150):
        shard = bytearray(original)
        for offset in generator.integers(0, min(200, place.image[1]), size=generator.integers(1, 4)):
            shard[place.image[0] + offset] ^= generator.integers(1, 256)
        place.shard.write_bytes(shard)
        try:
            outcomes.append(str(ShardReader(split).image(5, 32).shape))
        except DamagedSample as damage:
            outcomes.append(damage.cause)
    assert set(outcomes) <= {"(32, 32, 3)", IMAGE}
    assert outcomes.count(IMAGE) > 100  # PNG has checksums

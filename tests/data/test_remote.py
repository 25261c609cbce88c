"""Data sets behind a URL: the same batches as from disk, each shard fetched once, and what happens when the store fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlg_scale.cli.main import main
from mmlg_scale.data import scan
from mmlg_scale.data.corpus import Corpus, PairSet, open_pairs
from mmlg_scale.data.faults import EpochReport
from mmlg_scale.data.pipeline import Batch, StreamSettings
from mmlg_scale.data.reader import READ, ShardReader
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.data.store import CacheSettings
from mmlg_scale.errors import UserError
from mmlg_scale.recipe import Recipe
from tests.data.server import Server, used
from tests.data.sets import assert_same
from tests.data.specs import spec_for

NUM_SHARDS = 20
PER_SHARD = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training samples in 20 shards: two windows."""
    root = tmp_path_factory.mktemp("remote") / "set"
    write_scenes(root, num_train=NUM_SHARDS * PER_SHARD, num_val=4, num_test=8, seed=3, samples_per_shard=PER_SHARD)
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    found = Server(folder)
    yield found
    found.close()


def cache(tmp_path: Path, max_bytes: int = 10**9) -> CacheSettings:
    return CacheSettings(tmp_path / "cache", max_bytes, attempts=3, first_pause=0.01, timeout=20.0)


def batches(pairs: PairSet, folder: Path, count: int, *, start_step: int = 0, **options: object) -> list[Batch]:
    settings = StreamSettings(**{"global_batch_size": 16, "seed": 5, **options})  # type: ignore[arg-type]
    return list(islice(Corpus(pairs, spec_for(folder)).stream(settings, start_step), count))


def tars(server: Server, split: str) -> dict[str, int]:
    requests = dict(server.requests)  # handlers may still count
    return {name: count for name, count in requests.items() if name.startswith(f"{split}/") and name.endswith(".tar")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_troubled_server_gives_the_batches_of_the_disk(num_workers: int, folder: Path, server: Server, tmp_path: Path) -> None:
    server.plan["train/manifest.json"] = ["500"]
    for number, trouble in enumerate((["500"], ["cut"], ["503", "cut"], ["wrong"])):
        server.plan[f"train/shard-{number:06d}.tar"] = list(trouble)
        server.plan[f"train/index/shard-{number:06d}.npy"] = list(trouble)
    disk, remote = open_pairs(folder), open_pairs(server.url, cache(tmp_path))
    assert remote.digest() == disk.digest()
    assert remote.classes == disk.classes
    assert_same(batches(remote, folder, 7, num_workers=num_workers), batches(disk, folder, 7))  # more than an epoch
    wanted = dict.fromkeys((f"train/shard-{number:06d}.tar" for number in range(NUM_SHARDS)), 1)
    troubled = {f"train/shard-{number:06d}.tar": count for number, count in enumerate((2, 2, 3, 2))}
    assert tars(server, "train") == wanted | troubled
    keys = ShardReader(remote.root / "train", remote.store), ShardReader(folder / "train")
    assert [keys[0].key(index) for index in range(80)] == [keys[1].key(index) for index in range(80)]


def test_nothing_but_small_files_is_read_before_the_first_batch(folder: Path, server: Server, tmp_path: Path) -> None:
    pairs = open_pairs(server.url, cache(tmp_path))
    Corpus(pairs, spec_for(folder)).stream(StreamSettings(global_batch_size=16, seed=5))
    assert not [name for name in server.requests if name.endswith((".tar", ".npy"))]
    batches(pairs, folder, 1)
    assert pairs.store is not None
    pairs.store.wait()
    # One window's shards, and the next one's ahead of time.
    assert len(tars(server, "train")) == NUM_SHARDS
    assert not tars(server, "val")


def test_a_small_cache_stays_bounded(folder: Path, server: Server, tmp_path: Path) -> None:
    sizes = sorted(path.stat().st_size for kind in ("*.tar", "index/*.npy") for path in (folder / "train").glob(kind))
    bound = sum(sizes[-17:]) + sum(sizes[:20])
    assert bound < sum(sizes)
    kept = cache(tmp_path, bound)
    pairs, settings = open_pairs(server.url, kept), StreamSettings(global_batch_size=16, seed=5, cache_decoded=False)
    stream, disk = (iter(Corpus(found, spec_for(folder)).stream(settings)) for found in (pairs, open_pairs(folder)))
    for _ in range(12):
        assert_same([next(stream)], [next(disk)])
        assert used(kept) <= bound
    small = open_pairs(server.url, cache(tmp_path, sum(sizes[-10:])))
    with pytest.raises(UserError, match=r"data\.cache_bytes is [\d,]+; 16 shards of http://.*/train, whose samples are mixed, take [\d,]+"):
        batches(small, folder, 1)


SCRIPT = """
import sys
from itertools import islice
from pathlib import Path
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.pipeline import StreamSettings
from mmlg_scale.data.store import CacheSettings
from tests.data.specs import spec_for
url, folder, cache, rank = sys.argv[1:]
settings = StreamSettings(global_batch_size=16, seed=5, rank=int(rank), world_size=2)
stream = Corpus(open_pairs(url, CacheSettings(Path(cache), 10**9)), spec_for(Path(folder))).stream(settings)
print([batch.indices_B.tolist() for batch in islice(stream, 5)])
"""


@pytest.mark.slow
def test_two_processes_of_a_node_fetch_each_shard_once(folder: Path, server: Server, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, server.url, str(folder), str(tmp_path / "cache")]
    processes = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    found = [process.communicate(timeout=120)[0] for process in processes]
    wanted = [batch.indices_B.tolist() for batch in batches(open_pairs(folder), folder, 5)]
    assert found == [f"{[indices[half] for indices in wanted]}\n" for half in (slice(0, 8), slice(8, 16))]
    assert tars(server, "train") == dict.fromkeys((f"train/shard-{number:06d}.tar" for number in range(NUM_SHARDS)), 1)


@pytest.mark.parametrize("broken", ["train/shard-000003.tar", "train/index/shard-000003.npy"])
def test_a_shard_that_cannot_be_had_is_damage(broken: str, folder: Path, server: Server, tmp_path: Path) -> None:
    server.plan[broken] = ["500"] * 1000
    reports: list[EpochReport] = []
    corpus = Corpus(open_pairs(server.url, cache(tmp_path)), spec_for(folder))
    settings = StreamSettings(global_batch_size=16, seed=5, max_bad_fraction=0.2)
    seen = [index for batch in islice(corpus.stream(settings, on_epoch=reports.append), 5) for index in batch.indices_B.tolist()]
    lost = set(range(3 * PER_SHARD, 4 * PER_SHARD))
    assert set(seen).isdisjoint(lost)
    assert set(range(80)) - lost <= set(seen)
    assert reports[0].skipped.keys() == {READ}
    assert reports[0].skipped[READ] >= PER_SHARD
    assert server.requests[broken] <= 6  # by who reads and who fetches ahead, not for each sample
    with pytest.raises(UserError, match=rf"are more than data.max_bad_fraction 0.01.*{broken}.*HTTP 500") as caught:
        batches(open_pairs(server.url, cache(tmp_path)), folder, 5)
    assert "\n" not in str(caught.value)
    assert f"{server.url}/train/shard-000003.tar sample #" in str(caught.value)


def test_an_evaluation_is_that_of_the_disk(folder: Path, server: Server, tmp_path: Path) -> None:
    server.plan["test/shard-000000.tar"] = ["cut"]
    spec = spec_for(folder)
    found, wanted = (Corpus(pairs, spec).eval_split("test") for pairs in (open_pairs(server.url, cache(tmp_path)), open_pairs(folder)))
    assert torch.equal(found.images_uint8_NCHW(), wanted.images_uint8_NCHW())
    assert torch.equal(found.texts_MT(), wanted.texts_MT())
    server.plan["val/shard-000000.tar"] = ["500"] * 1000
    with pytest.raises(UserError, match=rf"{server.url}/val: 4 damaged samples \(read error 4\) are more than"):
        Corpus(open_pairs(server.url, cache(tmp_path)), spec).eval_split("val")


def test_what_checks_found_is_left_out_remotely_too(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    place = ShardReader(copy / "train").place(9)
    with open(place.shard, "r+b") as file:
        file.seek(place.image[0])
        file.write(bytes(place.image[1]))
    assert len(scan.scan(copy / "train", ShardReader(copy / "train"), check="decode")) == 1
    server = Server(copy)
    try:
        pairs = open_pairs(server.url, cache(tmp_path))
        reader = ShardReader(pairs.root / "train", pairs.store)
        assert np.array_equal(scan.scan(pairs.root / "train", reader, check="auto").positions(), [9])
        assert not tars(server, "train")
    finally:
        server.close()


def test_a_set_that_cannot_be_had_is_one_line(folder: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"HTTP 404 .*Check the bucket's and the folder's name"):
        open_pairs(f"{server.url}/elsewhere", cache(tmp_path))
    with pytest.raises(UserError, match=r"is remote. Give a folder on a disk of this node for copies of it: data.cache_dir"):
        open_pairs(server.url)
    for given, said in (
        ([], f"--data: {server.url} is remote. Give a folder on a disk of this node for copies of it: --cache-dir."),
        (["--cache-dir", "s3://b/c"], "--cache-dir s3://b/c is a URL. Give a folder on a disk of this node."),
    ):
        assert main(["eval", str(folder), "--data", server.url, *given]) == 2
        assert capsys.readouterr().err == f"mmlg: error: {said}\n"
    server.plan["dataset.json"] = ["403"]
    with pytest.raises(UserError, match=r"HTTP 403 Forbidden. These credentials may not read it"):
        open_pairs(server.url, cache(tmp_path))
    pairs = open_pairs(server.url, cache(tmp_path))
    shutil.rmtree(pairs.root / "val")
    with pytest.raises(UserError, match=rf"{server.url} has no split 'val'"):
        Corpus(pairs, spec_for(folder)).eval_split("val")
    with pytest.raises(UserError, match="of a kind that is not supported"):
        open_pairs("ftp://host/set", cache(tmp_path))


def test_a_full_cache_disk_is_no_damage(folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = open_pairs(server.url, cache(tmp_path))
    (tmp_path / "cache" / "locks").write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"data\.cache_dir: copies of http://\S+ cannot be kept"):
        batches(pairs, folder, 1)


def test_a_set_on_disk_may_be_named_by_a_url(folder: Path) -> None:
    assert open_pairs(f"file://{folder}").digest() == open_pairs(folder).digest()


def test_where_copies_are_kept_is_no_part_of_a_run() -> None:
    one, other = Recipe(), Recipe()
    other.data.path, other.data.cache_dir, other.data.cache_bytes = "s3://bucket/set", "/scratch", 10**9
    for role in ("ancestor", "extraction", "descendant", "features"):
        assert one.used_by(role, init="mmlg") == other.used_by(role, init="mmlg")

"""The stream of batches: one order for every world size, worker count and resume point."""

from __future__ import annotations

import shutil
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from mmlg_scale.data import captions, evaluation
from mmlg_scale.data.evaluation import load_eval_split
from mmlg_scale.data.images import decode
from mmlg_scale.data.pipeline import Batch, StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from tests.data.damage import KINDS
from tests.data.specs import spec_for


def batches(root: Path, count: int, *, start_step: int = 0, **options: object) -> list[Batch]:
    settings = StreamSettings(**{"global_batch_size": 24, "seed": 5, "augment": "crop", **options})  # type: ignore[arg-type]
    return list(islice(TrainStream(root / "train", spec_for(root), settings, start_step=start_step), count))


def assert_same(left: Batch, right: Batch) -> None:
    assert torch.equal(left.samples_BS, right.samples_BS)
    assert torch.equal(left.image_uint8_BCHW, right.image_uint8_BCHW)
    assert torch.equal(left.text_NT, right.text_NT)


def test_resumes_at_the_exact_sample(scenes: Path) -> None:
    whole = batches(scenes, 15)  # 360 positions: into the third epoch of 150
    for start in (1, 7, 13):
        for left, right in zip(whole[start:], batches(scenes, 15 - start, start_step=start, cache_decoded=False), strict=True):
            assert_same(left, right)


def test_a_bound_on_kept_tokens_changes_nothing(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches(scenes, 15)
    monkeypatch.setattr(captions, "TOKEN_CACHE_BYTES", 10_000)  # 13 of 150 samples with three captions of 16 tokens
    for left, right in zip(whole, batches(scenes, 15), strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_slices_of_one_batch(scenes: Path, world_size: int) -> None:
    whole = batches(scenes, 8)
    parts = [batches(scenes, 8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        joined = Batch(*(torch.cat([getattr(part[step], name) for part in parts]) for name in vars(batch)))
        assert_same(batch, joined)


def test_workers_change_nothing_and_end_well(scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batches; and though workers are stopped with batches under way, all of them end by themselves."""
    started: list[BaseProcess] = []
    start = BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", lambda process: (start(process), started.append(process)))
    for left, right in zip(batches(scenes, 5), batches(scenes, 5, num_workers=2), strict=True):
        assert_same(left, right)
    batches(scenes, 20, num_workers=2)
    for process in started:
        process.join(timeout=60)
    assert [process.exitcode for process in started] == [0] * 4


def test_every_epoch_reads_every_sample_once_in_another_order(scenes: Path) -> None:
    indices = torch.cat([batch.indices_B for batch in batches(scenes, 25, augment="none")])  # 600 positions: four epochs
    epochs = indices.reshape(4, 150)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(150))
    assert not torch.equal(epochs[0], epochs[1])


def test_captions_vary_between_epochs(scenes: Path) -> None:
    seen: dict[int, set[tuple[int, ...]]] = {}
    for batch in batches(scenes, 50, augment="none"):
        for index, text in zip(batch.indices_B.tolist(), batch.text_NT.tolist(), strict=True):
            seen.setdefault(index, set()).add(tuple(text))
    reader, tokenizer = ShardReader(scenes / "train"), spec_for(scenes).tokenizer
    for index, texts in seen.items():
        assert texts <= {tuple(row) for row in tokenizer(reader.about(index)["captions"], 16).tolist()}
    assert np.mean([len(texts) for texts in seen.values()]) > 2.5  # of three, after eight epochs


def test_crop_is_bounded_and_random(scenes: Path) -> None:
    plain, cropped = batches(scenes, 1, augment="none")[0], batches(scenes, 1)[0]
    assert torch.equal(plain.indices_B, cropped.indices_B)
    difference = (plain.image_uint8_BCHW.float() - cropped.image_uint8_BCHW.float()).abs().mean()
    assert 1 < difference < 60


def test_too_small_or_uneven_is_refused(scenes: Path) -> None:
    with pytest.raises(UserError, match="has 150 samples, batch_size is 151"):
        batches(scenes, 1, global_batch_size=151)
    with pytest.raises(UserError, match="not a multiple of the 5 ranks"):
        batches(scenes, 1, world_size=5)
    with pytest.raises(UserError, match="augment 'flip' is unknown"):
        batches(scenes, 1, augment="flip")


def test_the_stream_leaves_the_global_random_state_alone(scenes: Path) -> None:
    before = torch.get_rng_state()
    batches(scenes, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_that_does_not_decode_is_named(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "copy")
    reader = ShardReader(tmp_path / "copy" / "train")
    place = reader.place(45)
    shard = bytearray(place.shard.read_bytes())
    shard[place.image[0] : place.image[0] + 20] = bytes(20)
    place.shard.write_bytes(shard)
    reader = ShardReader(tmp_path / "copy" / "train")
    with pytest.raises(UserError, match=r"shard-000001.tar sample 00000045: undecodable image"):
        reader.image(45, 32)
    assert np.array_equal(reader.image(46, 32), ShardReader(scenes / "train").image(46, 32))


def test_evaluation_split_maps_captions_to_images(scenes: Path) -> None:
    spec = spec_for(scenes)
    split = load_eval_split(scenes / "test", spec)
    texts_MT = split.texts_MT()
    reader = ShardReader(scenes / "test")
    assert split.labels_N is not None
    assert split.labels_N.tolist() == [reader.about(index)["label"] for index in range(30)]
    assert split.text_to_image_M.tolist() == [index for index in range(30) for _ in range(2)]
    for position, text in enumerate(split.captions):
        owner = int(split.text_to_image_M[position])
        assert text in reader.about(owner)["captions"]
        assert torch.equal(texts_MT[position], spec.tokenizer([text], 16)[0])
    assert split.num_truncated == 0
    image = decode(split.image_png(4), 32)
    assert np.array_equal(image, decode(reader.image_bytes(4), 32))
    assert torch.equal(split.images_uint8_NCHW()[4], torch.from_numpy(image.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("kept_bytes", [evaluation.KEPT_BYTES, 0])
def test_chunks_of_an_evaluation_are_the_split(kept_bytes: int, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a chunk, in any order and twice; nothing is kept of a split that is too large for it."""
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    monkeypatch.setattr(evaluation, "KEPT_BYTES", kept_bytes)
    spec, reader = spec_for(scenes), ShardReader(scenes / "test")
    split = load_eval_split(scenes / "test", spec)
    pixels = np.stack([reader.image(index, 32) for index in range(30)]).transpose(0, 3, 1, 2)
    for _ in range(2):
        for number, chunk in zip((4, 0, 2, 2), split.images.read([4, 0, 2, 2]), strict=True):
            assert np.array_equal(chunk.numpy(), pixels[7 * number : 7 * number + 7])
        assert np.array_equal(split.images_uint8_NCHW().numpy(), pixels)
        assert torch.equal(split.texts_MT(), spec.tokenizer(list(split.captions), 16))
    assert (len(split.images), len(split.texts)) == (5, 9)
    assert (split.images._kept is None) == (kept_bytes == 0)
    assert split.captions[-1] == split.captions[59] == reader.about(29)["captions"][-1]
    assert split.captions[57:] == list(split.captions)[57:]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 samples in 38 shards: an epoch of three windows, with damaged samples in some of them."""
    root = tmp_path_factory.mktemp("windows") / "scenes"
    write_scenes(root, num_train=150, num_val=4, num_test=4, seed=3, samples_per_shard=4)
    for shard, position in ((3, 0), (3, 1), (20, 3), (37, 1)):
        KINDS["json cut"][0](root / "train", shard, position)
    return root


def sample_rows(root: Path, count: int, **options: object) -> list[list[list[int]]]:
    return [batch.samples_BS.tolist() for batch in batches(root, count, max_bad_fraction=1.0, **options)]


@pytest.mark.parametrize("num_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_windows_are_one_order_for_all_ranks_workers_and_starts(windows: Path, num_workers: int) -> None:
    """1, 2 and 4 ranks, stopped and resumed in the middle of a window: the same samples and captions, none lost, none twice.

    With three workers only what is resumed on two ranks: each worker takes seconds to start.
    """
    whole = sample_rows(windows, 14)
    flat = [sample for step in whole for sample, _ in step]
    intact = set(range(150)) - {12, 13, 83, 149}
    for epoch in range(2):
        assert sorted(flat[146 * epoch : 146 * (epoch + 1)]) == sorted(intact)
    resumed = (4, 9)  # step 4 begins at place 96, in the second window of the first epoch
    for world_size in (2,) if num_workers else (1, 2, 4):
        for start, stop in (resumed,) if num_workers else ((0, 4), resumed):
            ranks = range(world_size)
            parts = [
                sample_rows(windows, stop - start, start_step=start, rank=rank, world_size=world_size, num_workers=num_workers)
                for rank in ranks
            ]
            assert [[row for part in parts for row in part[step]] for step in range(stop - start)] == whole[start:stop]

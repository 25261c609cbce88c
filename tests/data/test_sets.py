"""Data sets as they stand on disk: the same bytes every time, splits apart, readable by others, whole or not at all."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mmlg_scale.data.evaluation import load_eval_split
from mmlg_scale.data.manifest import load_manifest
from mmlg_scale.data.pack import PackSettings, pack_folders, pack_table
from mmlg_scale.data.publish import Sample, new_dataset, write_split
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.data.scenes import COLOURS, SHAPES, SIZES, all_scenes, captions, classnames, render, write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.records import KEY
from tests.data.specs import spec_for


def hashes(root: Path) -> list[str]:
    return [shard["sha256"] for split in ("train", "val", "test") for shard in load_manifest(root / split)["shards"]]


def test_scenes_are_deterministic_and_written_once(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again"
    write_scenes(again, num_train=150, num_val=20, num_test=30, seed=3, samples_per_shard=40)
    assert hashes(again) == hashes(scenes)
    stamp = (again / "dataset.json").stat().st_mtime_ns
    assert capsys.readouterr().out == ""
    write_scenes(again, num_train=150, num_val=20, num_test=30, seed=3, samples_per_shard=40)
    assert (again / "dataset.json").stat().st_mtime_ns == stamp
    assert "already contains this data set" in capsys.readouterr().out
    with pytest.raises(UserError, match="other arguments"):
        write_scenes(again, num_train=151, num_val=20, num_test=30, seed=3, samples_per_shard=40)


def meaning(text: str) -> tuple[object, ...]:
    """What a caption says, whichever object it starts with: the set of things, and which of them is left or above."""
    words = [word for word in text.replace("to the ", "").split() if word not in ("a", "the", "is", "there", "of")]
    relation = next(word for word in words if word in ("left", "right", "above", "over", "below", "under"))
    middle = words.index(relation)
    synonym = {name: size for size, (_, names) in SIZES.items() for name in names}
    first, second = ((synonym[w[0]], w[1], w[2]) for w in (words[:middle], words[middle + 1 :]))
    if relation in ("right", "below", "under"):
        first, second = second, first
    return first, "left" if relation in ("left", "right") else "above", second


def test_splits_share_no_scene_and_captions_agree(scenes: Path) -> None:
    told: dict[str, list[tuple[object, ...]]] = {}
    for split in ("train", "val", "test"):
        reader = ShardReader(scenes / split)
        told[split] = []
        for index in range(len(reader)):
            meanings = {meaning(text) for text in reader.about(index)["captions"]}
            assert len(meanings) == 1
            told[split].append(meanings.pop())
    assert len(set(told["val"])) == 20
    assert len(set(told["test"])) == 30
    assert not set(told["train"]) & (set(told["val"]) | set(told["test"]))
    assert not set(told["val"]) & set(told["test"])


def test_labels_name_the_main_object(scenes: Path) -> None:
    classes = json.loads((scenes / "classes.json").read_text())
    spec = spec_for(scenes)
    tokenizer = spec.tokenizer
    split = load_eval_split(scenes / "train", spec)
    assert split.labels_N is not None
    sizes = set()
    for index, label in enumerate(split.labels_N.tolist()):
        first, _, second = meaning(split.captions[3 * index])
        main = second if first[0] == "small" and second[0] == "large" else first
        assert classes["classnames"][label] == f"{main[1]} {main[2]}"
        sizes.add((first[0], second[0]))
    assert len(sizes) == 4
    assert classes["classnames"] == classnames()
    prompts = [template.replace("{}", name) for template in classes["templates"] for name in classnames()]
    assert not (tokenizer(prompts, 16) == 1).any()  # every word of a prompt is known
    assert len({tuple(row) for row in tokenizer(prompts, 16).tolist()}) == len(prompts)


def test_what_is_drawn_is_what_is_said() -> None:
    """The centre of mass of each named colour lies where the caption puts it, and large things cover more than small ones."""
    generator = np.random.default_rng(0)
    checked = 0
    for scene in all_scenes()[::97]:
        if scene.a.colour == scene.b.colour:
            continue
        pixels = np.asarray(render(scene, 32, generator)).astype(float)
        places, areas = [], []
        for thing in (scene.a, scene.b):
            near = np.linalg.norm(pixels - np.array(COLOURS[thing.colour]), axis=-1) < 60
            rows, columns = np.nonzero(near)
            places.append((np.median(columns), np.median(rows)))
            areas.append(near.sum())
        axis = 0 if scene.relation == "left" else 1
        assert places[0][axis] < places[1][axis], captions(scene, 1, generator)
        if (scene.a.size, scene.b.size, scene.a.shape) == ("large", "small", scene.b.shape):
            assert areas[0] > areas[1]
        checked += 1
    assert checked > 80
    assert len(all_scenes()) == (len(SIZES) * len(COLOURS) * len(SHAPES)) * (len(SIZES) * len(COLOURS) * len(SHAPES) - 1) * 2


def test_offsets_are_tarfiles(scenes: Path) -> None:
    reader = ShardReader(scenes / "train")
    position = 0
    for shard in load_manifest(scenes / "train")["shards"]:
        assert set(shard) == {"file", "samples", "bytes", "sha256", "index"}
        content = (scenes / "train" / shard["file"]).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for key in dict.fromkeys(name.partition(".")[0] for name in members):
            place = reader.place(position)
            assert (place.key, place.extension) == (key, "png")
            assert reader.image_bytes(position) == members[f"{key}.png"]
            assert reader.about(position) == json.loads(members[f"{key}.json"])
            assert members[f"{key}.txt"].decode() == reader.about(position)["captions"][0]
            for (offset, size), extension in ((place.image, "png"), (place.text or (0, 0), "txt"), (place.json or (0, 0), "json")):
                assert content[offset : offset + size] == members[f"{key}.{extension}"]
            position += 1
    assert position == 150
    samples = np.random.default_rng(0).permutation(150)
    shards, records = reader.locate(samples)
    for sample, number, record in zip(samples.tolist(), shards.tolist(), records, strict=True):
        place = reader.place(sample)
        assert (reader.shards.path(number), record["image"], record["image_size"]) == (place.shard, *place.image)


def test_webdataset_reads_the_shards(scenes: Path) -> None:
    paths = sorted(str(path) for path in (scenes / "val").glob("*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("png", "txt", "json"))
    reader = ShardReader(scenes / "val")
    assert len(samples) == 20
    for index, (image, text, about) in enumerate(samples):
        assert image.shape == (32, 32, 3)
        assert about["captions"] == reader.about(index)["captions"]
        assert text == about["captions"][0]


def edit(manifest: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(manifest.read_text())
    del content[KEY]
    change(content["shards"][0])
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "the folder is missing"),
        (lambda split: (split / "manifest.json").unlink(), "4 shards and no manifest.json"),
        (lambda split: (split / "manifest.json").write_text('{"format_ver'), "manifest.json is damaged: it is not JSON"),
        (lambda split: (split / "manifest.json").write_text("{}"), "is empty or of another version"),
        (lambda split: edit(split / "manifest.json", lambda shard: shard.pop("bytes")), "is damaged, or of another version: 'bytes'"),
        (lambda split: edit(split / "manifest.json", lambda shard: shard.update(samples=39)), "not as many as it says"),
        (lambda split: edit(split / "manifest.json", lambda shard: shard.update(samples=10**9)), "a shard of 1000000000 samples"),
        (lambda split: edit(split / "manifest.json", lambda shard: shard.update(file="shard-000001.tar")), "a shard is listed twice"),
    ],
)
def test_damage_is_named(scenes: Path, tmp_path: Path, damage, said: str) -> None:
    shutil.copytree(scenes, tmp_path / "copy")
    damage(tmp_path / "copy" / "train")
    with pytest.raises(UserError, match=said):
        ShardReader(tmp_path / "copy" / "train")


def write_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        paths.append(folder / f"{index}.png")
        Image.fromarray(np.full((20, 30, 3), 10 * index, np.uint8)).save(paths[-1])
    return paths


def test_a_table_is_packed_with_all_captions_of_an_image(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "images", 20)
    rows = [f"images/{i}.png\tcaption {i} {n}" for i in range(20) for n in range(1 + i % 3)]
    table = tmp_path / "in" / "table.tsv"
    table.write_text("filepath\tcaption\n" + "\n".join(rows) + "\n")
    pack_table(table, tmp_path / "out", PackSettings(seed=1))
    seen = {}
    for split, size in (("train", 17), ("val", 1), ("test", 2)):
        reader = ShardReader(tmp_path / "out" / split)
        assert len(reader) == size
        for index in range(size):
            found = reader.about(index)["captions"]
            number = int(found[0].split()[1])
            assert found == [f"caption {number} {n}" for n in range(1 + number % 3)]
            assert reader.image_bytes(index) == (tmp_path / "in" / "images" / f"{number}.png").read_bytes()
            seen[number] = split
    assert len(seen) == 20


def test_a_missing_image_is_named_with_its_row_and_nothing_is_written(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 3)
    table = tmp_path / "in" / "t.csv"
    table.write_text('filepath,caption\n0.png,"one, two"\n7.png,x\n')
    with pytest.raises(UserError, match=r"t.csv row 3: no image .*7.png"):
        pack_table(table, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    (tmp_path / "in" / "7.png").write_text("no image")
    with pytest.raises(UserError, match=r"row 3: .*7.png cannot be read as an image"):
        pack_table(table, tmp_path / "out")
    table.write_text("file,caption\n0.png,x\n")
    with pytest.raises(UserError, match=r"no column 'filepath'; it has: file, caption"):
        pack_table(table, tmp_path / "out")


@pytest.mark.parametrize("other", ["tabby cat", "Tabby_cat", "tabby__cat"])
def test_folders_that_a_tokenizer_takes_for_one_class_are_refused(other: str, tmp_path: Path) -> None:
    for name in ("dog", "tabby_cat", other):
        write_images(tmp_path / "in" / name, 3)
    with pytest.raises(UserError, match=r"tabby_cat'.* one class to a tokenizer\. Put their images together, or rename one"):
        pack_folders(tmp_path / "in", tmp_path / "out", templates=["a {}"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / other).rename(tmp_path / "in" / "siamese_cat")
    pack_folders(tmp_path / "in", tmp_path / "out", templates=["a {}"])
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["classnames"] == ["dog", "siamese cat", "tabby cat"]


def test_folders_become_classes(tmp_path: Path) -> None:
    for name in ("cat", "hot_dog"):
        write_images(tmp_path / "in" / name, 10)
    pack_folders(tmp_path / "in", tmp_path / "out", PackSettings(resize=16), templates=["a {}.", "one {} here"])
    assert json.loads((tmp_path / "out" / "classes.json").read_text())["classnames"] == ["cat", "hot dog"]
    labels = []
    for split in ("train", "val", "test"):
        reader = ShardReader(tmp_path / "out" / split)
        for index in range(len(reader)):
            about = reader.about(index)
            name = ("cat", "hot dog")[about["label"]]
            assert about["captions"] == [f"a {name}.", f"one {name} here"]
            labels.append(about["label"])
    assert sorted(labels) == [0] * 10 + [1] * 10
    with pytest.raises(UserError, match=r"has no \{\}"):
        pack_folders(tmp_path / "in", tmp_path / "other", templates=["a thing"])
    with pytest.raises(UserError, match="no folder"):
        pack_folders(tmp_path / "none", tmp_path / "other", templates=["a {}"])
    with pytest.raises(UserError, match="no caption templates"):
        pack_folders(tmp_path / "in", tmp_path / "other", templates=[])
    assert not (tmp_path / "other").exists()


def test_splits_in_folders_are_obeyed(tmp_path: Path) -> None:
    counts = {"train": 4, "val": 1, "test": 2}
    for split, count in counts.items():
        for name in ("car", "train"):
            write_images(tmp_path / "in" / split / name, count)
    pack_folders(tmp_path / "in", tmp_path / "out", templates=["a {}"])
    for split, count in counts.items():
        reader = ShardReader(tmp_path / "out" / split)
        assert sorted((reader.about(i)["label"], reader.about(i)["captions"]) for i in range(len(reader))) == (
            [(0, ["a car"])] * count + [(1, ["a train"])] * count
        )
    shutil.rmtree(tmp_path / "in" / "val")
    with pytest.raises(UserError, match="none named val"):
        pack_folders(tmp_path / "in", tmp_path / "other", templates=["a {}"])
    # A class may be called train.
    for name in ("car", "train"):
        write_images(tmp_path / "classes" / name, 10)
    pack_folders(tmp_path / "classes", tmp_path / "vehicles", templates=["a {}"])
    assert json.loads((tmp_path / "vehicles" / "classes.json").read_text())["classnames"] == ["car", "train"]


def test_another_source_is_not_taken_for_the_packed_one(tmp_path: Path) -> None:
    """The same table over other images, and an image moved to the next class: the bytes in reading order are the same."""
    table = tmp_path / "in" / "t.csv"
    paths = write_images(tmp_path / "in", 10)
    table.write_text("filepath,caption\n" + "".join(f"{path.name},x\n" for path in paths))
    pack_table(table, tmp_path / "out")
    pack_table(table, tmp_path / "out")
    Image.fromarray(np.full((20, 30, 3), 255, np.uint8)).save(paths[3])
    with pytest.raises(UserError, match="made with other arguments"):
        pack_table(table, tmp_path / "out")
    for name in ("a", "b"):
        write_images(tmp_path / "folders" / name, 10)
    pack_folders(tmp_path / "folders", tmp_path / "packed", templates=["a {}"])
    (tmp_path / "folders" / "a" / "9.png").rename(tmp_path / "folders" / "b" / "+.png")
    with pytest.raises(UserError, match="made with other arguments"):
        pack_folders(tmp_path / "folders", tmp_path / "packed", templates=["a {}"])


def test_one_image_is_in_one_split(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    table = tmp_path / "t.csv"
    table.write_text("filepath,caption,split\n0.png,x,train\n1.png,x,val\n2.png,x,test\n./0.png,y,train\n")
    pack_table(table, tmp_path / "out")
    assert ShardReader(tmp_path / "out" / "train").about(0)["captions"] == ["x", "y"]
    for rows, said in (
        ("0.png,x,train\n./0.png,y,val\n", "row 3: 0.png is in split train and in val"),
        ("0.png,x,dev\n", "row 2: split 'dev' is not one of train, val, test"),
        ("0.png,x,train\n1.png,x,\n", "1 have none"),
        ("0.png,x,train\n1.png,x,val\n", "split test has no images"),
        ("0.png, ,train\n", "row 2: empty caption"),
        (",x,train\n", "row 2: empty filepath"),
        ("t.csv,x,train\n", "t.csv does not end in .png"),
    ):
        table.write_text("filepath,caption,split\n" + rows)
        with pytest.raises(UserError, match=said):
            pack_table(table, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_a_set_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Sample]:
        yield Sample("00000000", b"x", "png", ["x"])
        raise KeyboardInterrupt

    def write() -> None:
        with new_dataset(tmp_path / "out", "scenes", {}) as root:
            assert root is not None
            write_split(root, "train", interrupted(), samples_per_shard=1)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_another_process_makes_meanwhile_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def write(root: Path, args: dict[str, object], meanwhile: Path | None = None) -> None:
        with new_dataset(root, "scenes", args) as new:
            assert new is not None
            write_split(new, "train", iter([Sample("00000000", b"x", "png", ["x"])]), samples_per_shard=1)
            if meanwhile is not None:
                meanwhile.rename(root)

    write(tmp_path / "same", {"seed": 0})
    write(out, {"seed": 0}, tmp_path / "same")
    assert "already contains this data set" in capsys.readouterr().out
    assert len(load_manifest(out / "train")["shards"]) == 1
    out.rename(tmp_path / "other")
    with pytest.raises(UserError, match="out contains a data set made with other arguments"):
        write(out, {"seed": 1}, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_in_the_way_is_kept(tmp_path: Path) -> None:
    file, folder, damaged = tmp_path / "file", tmp_path / "folder", tmp_path / "damaged"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    damaged.mkdir()
    (damaged / "dataset.json").write_text("{")
    for out, said in ((file, "is a file"), (folder, "contains files that are not a data set"), (damaged, "dataset.json is damaged")):
        with pytest.raises(UserError, match=said):
            write_scenes(out, num_train=1, num_val=1, num_test=1)
    assert file.read_text() == (folder / "mine.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3

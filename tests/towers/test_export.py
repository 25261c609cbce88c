"""Exports: what is replaced and what stays, who can read it, and what a kill leaves; one tower by itself."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmlg_scale import towers
from mmlg_scale.digests import SEAL_FILE
from mmlg_scale.errors import in_words
from mmlg_scale.records import KEY, write_record
from mmlg_scale.towers.bundle import CONFIG_FILE, TOWER_FILE, TOWER_WEIGHTS_FILE, WEIGHTS_FILE
from tests.towers.models import PLAIN, assert_close, assert_one_line, batch, changed, clip_of, features, word_tokenizer

WORDS = word_tokenizer(" ".join("abcdefghijklmnop"))
CONFIG = towers.model_config(PLAIN)


def bundle(scale: float = 1.0, files: dict[str, str] | None = None) -> towers.Bundle:
    spec = towers.ModelSpec(CONFIG, tokenizer=towers.tokenizer_from_files(files or {}))
    return towers.Bundle(spec, {name: tensor.detach() * scale for name, tensor in clip_of(CONFIG).state_dict().items()})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OWN = [SEAL_FILE, CONFIG_FILE, WEIGHTS_FILE]


def test_what_is_not_of_an_export_stays(tmp_path: Path) -> None:
    """Files, folders and links of a person; the tokenizer of the former export goes with it."""
    out = tmp_path / "out"
    towers.export(bundle(1.0, WORDS), out)
    assert names(out) == sorted([*OWN, "tokenizer.json", "tokenizer_config.json"])
    (out / "notes.txt").write_text("mine")
    (out / "figures").mkdir()
    (out / "figures/one.txt").write_text("mine too")
    (out / "link").symlink_to("gone")
    (out / "vocab.json").write_text("{}")
    inode = (out / "notes.txt").stat().st_ino
    assert_one_line(lambda: towers.export(bundle(), out), "out", "--overwrite to replace the export")
    towers.export(bundle(2.0), out, overwrite=True)
    assert names(out) == sorted([*OWN, "notes.txt", "figures", "link", "vocab.json"])
    assert (out / "figures/one.txt").read_text() == "mine too"
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "notes.txt").stat().st_ino == inode
    assert os.readlink(out / "link") == "gone"
    assert towers.load_clip(out).digest() == bundle(2.0).digest()
    assert names(tmp_path) == ["out"]


def test_a_persons_tokenizer_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    towers.export(bundle(), out)
    (out / "tokenizer.json").write_text("mine")
    assert_one_line(lambda: towers.export(bundle(1.0, WORDS), out, overwrite=True), "tokenizer.json", "was not written with the export")
    towers.export(bundle(2.0), out, overwrite=True)
    assert (out / "tokenizer.json").read_text() == "mine"


def test_a_tower_replaces_a_model_and_the_other_way_round(tmp_path: Path) -> None:
    out = tmp_path / "out"
    towers.export(bundle(1.0, WORDS), out)
    towers.export_tower(bundle(1.0, WORDS), "text", out, overwrite=True)
    assert names(out) == sorted([SEAL_FILE, TOWER_FILE, TOWER_WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json"])
    towers.export_tower(bundle(1.0, WORDS), "image", out, overwrite=True)
    assert names(out) == sorted([SEAL_FILE, TOWER_FILE, TOWER_WEIGHTS_FILE])
    towers.export(bundle(), out, overwrite=True)
    assert names(out) == OWN


@pytest.mark.parametrize("overwrite", [True, False])
def test_folders_that_are_no_export(overwrite: bool, tmp_path: Path) -> None:
    empty, foreign, file = tmp_path / "empty", tmp_path / "foreign", tmp_path / "file"
    empty.mkdir()
    towers.export(bundle(), empty, overwrite=overwrite)
    assert names(empty) == OWN
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    said = "exists and is not an exported model: it contains notes.txt. Give another --out, or an empty folder."
    message = assert_one_line(lambda: towers.export(bundle(), foreign, overwrite=overwrite), "foreign", said)
    assert "overwrite" not in message
    assert names(foreign) == ["notes.txt"]
    file.write_text("mine")
    assert_one_line(lambda: towers.export(bundle(), file, overwrite=overwrite), "file", "exists and is not a folder")
    for out, said in ((file / "below", f"{file}: a part of this path is a file"), (tmp_path / ("x" * 300), "the name is too long")):
        with pytest.raises(OSError, match=r"\[Errno") as error:
            towers.export(bundle(), out, overwrite=overwrite)
        assert said in str(in_words(error.value))
    assert names(tmp_path) == ["empty", "file", "foreign"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    towers.export(bundle(), tmp_path / "link")
    towers.export(bundle(2.0), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk") == OWN
    assert towers.load_clip(tmp_path / "link").digest() == bundle(2.0).digest()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_are_those_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        towers.export(bundle(1.0, WORDS), tmp_path / "out")
        towers.export_tower(bundle(), "image", tmp_path / "tower")
        (tmp_path / "out").chmod(0o700)
        towers.export(bundle(1.0, WORDS), tmp_path / "out", overwrite=True)
    finally:
        os.umask(before)
    for path in [*(tmp_path / "out").iterdir(), *(tmp_path / "tower").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path
    assert (tmp_path / "tower").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700, "as its owner set it"


def test_a_full_disk_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    towers.export(bundle(), out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        towers.export(bundle(2.0), out, overwrite=True)
    assert error.value.filename == str(out)
    assert names(tmp_path) == ["out"]
    assert towers.load_clip(out).digest() == bundle().digest()


def export_and_die(model: towers.Bundle, out: Path, last: int) -> int:
    """Overwrite an export in a child that is killed just before its change number `last` of the file system; how the child ended."""
    child = os.fork()
    if child == 0:
        calls, changes = 0, ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod", "ctypes.dlsym")

        def audit(event: str, args: tuple[Any, ...]) -> None:
            nonlocal calls
            if event in changes or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
                calls += 1
                if calls == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(audit)
            towers.export(model, out, overwrite=True)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_at_any_instant_leaves_the_old_export_or_the_new_one(tmp_path: Path) -> None:
    """A child is killed before its first change of the file system, its second, and so on, until one lives."""
    old, new, seen, out = bundle(), bundle(2.0), set[tuple[int, str]](), tmp_path / "room/out"
    towers.export(old, out)
    (out / "notes.txt").write_text("mine")
    for last in range(1, 40):
        code = export_and_die(new, out, last)
        digest = towers.load_clip(out).digest()
        assert digest in (old.digest(), new.digest())
        assert (out / "notes.txt").read_text() == "mine"
        seen.add((code, digest))
        if code == 0:
            break
        towers.export(old, out, overwrite=True)
    assert last > 10
    assert seen == {(-signal.SIGKILL, old.digest()), (-signal.SIGKILL, new.digest()), (0, new.digest())}


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_tower(modality: str, tmp_path: Path) -> None:
    """Its features are those of the whole model."""
    towers.export_tower(bundle(), modality, tmp_path / "tower")
    tower = towers.load_tower(tmp_path / "tower").eval()
    images, texts = batch(CONFIG)
    with torch.no_grad():
        found = tower(images if modality == "image" else texts)
    assert_close((found,), (features(clip_of(CONFIG), CONFIG)[modality == "text"],), 1e-6)


def described(**entries: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / TOWER_FILE).read_text())
        (folder / TOWER_FILE).write_text(json.dumps(content | entries))

    return change


def weighed(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        state = load_file(folder / TOWER_WEIGHTS_FILE)
        edit(state)
        save_file(state, folder / TOWER_WEIGHTS_FILE)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / TOWER_FILE).unlink(), "no description of a tower"),
        (lambda folder: (folder / TOWER_FILE).write_text("["), "is not JSON"),
        (lambda folder: (folder / TOWER_WEIGHTS_FILE).unlink(), "no file of weights"),
        (lambda folder: (folder / TOWER_WEIGHTS_FILE).write_bytes(b"x" * 50), "is not a safetensors file"),
        (described(modality="audio"), "modality is 'audio'"),
        (described(model_cfg=None), "needs embed_dim, vision_cfg and text_cfg"),
        (described(model_cfg=changed(PLAIN, "vision_cfg", layers=2)), "has shape (48,), tower.json asks for none"),
        (
            described(model_cfg=changed(PLAIN, "vision_cfg", image_size=24)),
            "has shape (5, 16), tower.json asks for (10, 16)",
        ),
        (weighed(lambda state: state.pop("proj")), "proj has shape none"),
        (weighed(lambda state: state["proj"].fill_(float("inf"))), "proj has 256 of 256 numbers"),
    ],
)
def test_towers_that_are_refused(change: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    towers.export_tower(bundle(), "image", tmp_path / "tower")
    (tmp_path / "tower" / SEAL_FILE).unlink()  # otherwise other weights are refused for their digest
    change(tmp_path / "tower")
    assert_one_line(lambda: towers.load_tower(tmp_path / "tower"), str(tmp_path / "tower"), said)
    assert_one_line(lambda: towers.load_tower(tmp_path / "nowhere"), "nowhere", "no model folder")


def test_an_unknown_modality_is_one_line(tmp_path: Path) -> None:
    assert_one_line(lambda: towers.export_tower(bundle(), "audio", tmp_path / "tower"), "audio", "Use one of: image, text")


# Files that have changed since they were exported


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    towers.export(bundle(1.0, WORDS), tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, old: str, new: str) -> None:
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))


def test_an_edited_configuration_is_used_and_said_to_be_edited(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each edit is told, with what silences the line; without the list of digests the configuration is the user's."""
    config, seal = exported / CONFIG_FILE, exported / SEAL_FILE
    for old, new in (("bicubic", "bilinear"), ("bilinear", "bicubic"), ('"mode": "RGB"', '"mode":  "RGB"')):
        edit(config, old, new)
        found = towers.load_clip(exported)
        assert found.spec.preprocess.interpolation == ("bilinear" if new == "bilinear" else "bicubic")
        said = capsys.readouterr().err
        told = f"mmlg: {config} has changed since it was exported (SHA-256 now "
        assert said.count("\n") == int(new != "bicubic"), said  # the second edit takes the first one back
        assert not said or (said.startswith(told) and said.endswith(f"else remove {seal} to silence this.\n"))
    seal.unlink()
    assert towers.load_clip(exported).spec.digest() == bundle(1.0, WORDS).spec.digest()
    assert capsys.readouterr().err == ""


def test_an_edited_description_of_a_tower_is_used_and_said_to_be_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    towers.export_tower(bundle(), "image", tmp_path / "tower")
    before = towers.load_tower(tmp_path / "tower")
    assert capsys.readouterr().err == ""
    description = tmp_path / "tower" / TOWER_FILE
    edit(description, '"embed_dim": 16,', '"embed_dim": 16, "quick_gelu": true,')
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (towers.load_tower(tmp_path / "tower")(images) - before(images)).abs().max() > 1e-4
    assert f"mmlg: {description} has changed since it was exported" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_edited_tokenizer_is_refused(name: str, exported: Path) -> None:
    with (exported / name).open("a") as file:
        file.write("\n")
    said = assert_one_line(lambda: towers.load_clip(exported), name, "is not the file that was exported with the weights (SHA-256)")
    assert said.endswith(f"if you changed it on purpose, remove {exported / SEAL_FILE}.")
    (exported / SEAL_FILE).unlink()
    assert torch.equal(towers.load_clip(exported).spec.tokenizer(["a b p"], 8), bundle(1.0, WORDS).spec.tokenizer(["a b p"], 8))


def test_weights_of_another_model_of_the_same_size_are_noticed(exported: Path, tmp_path: Path) -> None:
    towers.export(bundle(2.0, WORDS), tmp_path / "other")
    (tmp_path / "other" / WEIGHTS_FILE).replace(exported / WEIGHTS_FILE)
    assert_one_line(lambda: towers.load_clip(exported), WEIGHTS_FILE, "is not the file that was exported with")


def test_a_list_of_digests_can_name_no_other_file(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "canary").write_text("secret")
    content = json.loads((exported / SEAL_FILE).read_text())
    del content[KEY]
    write_record(exported / SEAL_FILE, {**content, "files": {"../canary": "0" * 64}})
    assert_one_line(lambda: towers.load_clip(exported), SEAL_FILE, "names '../canary', which no export has")

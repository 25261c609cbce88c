"""What the machine refuses, wherever something is written: a line with the path, exit code 2, nothing lost, the same numbers afterwards."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from mmlg_scale import files
from mmlg_scale.cli import main
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import in_words
from mmlg_scale.towers import bundle
from mmlg_scale.training import checkpoint, features, loop
from tests.disks import Disk, disk, mounted, unprivileged_folder

TRAINING = {"steps": 6, "batch_size": 16, "eval_every": 3}
RECIPE: dict[str, Any] = {
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
        }
    },
    "ancestor": TRAINING,
    "extraction": {"training": TRAINING},
    "baselines": {"scratch": None, "even": None, "distil": None},  # their batches of 128 are more than there is
    "runtime": {"log_every": 1},
}
FULL = ("the disk is full", "the limit on file sizes", "reading or writing failed")
"""As small and limited disks say it; torch.save does not say why it failed."""


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *said: str) -> str:
    """The one line of an error; without a traceback, and with one of `said` in it."""
    capsys.readouterr()
    code = main(words)
    out = "".join(capsys.readouterr())
    assert code == 2, out
    assert "Traceback" not in out
    lines = [line for line in out.splitlines() if line.startswith("mmlg: error: ")]
    assert len(lines) == 1, out
    assert not said or any(part in lines[0] for part in said), lines[0]
    return lines[0]


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data set, a recipe, an undisturbed run and its ancestor's features, where every user can read them."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    write_scenes(root / "data", num_train=96, num_val=12, num_test=12, seed=0, image_size=32)
    (root / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(train(root, root / "run")) == 0
    assert main(keep_features(root, root / "features")) == 0
    yield root
    shutil.rmtree(root)


def train(made: Path, out: Path) -> list[str]:
    return ["train", str(made / "recipe.yaml"), "--data.path", str(made / "data"), "--out", str(out)]


def keep_features(made: Path, out: Path) -> list[str]:
    model = str(made / "run" / "model")
    return ["features", str(made / "recipe.yaml"), "--data.path", str(made / "data"), "--ancestor-model", model, "--out", str(out)]


def numbers(run: Path) -> dict[str, Any]:
    """Everything of a run that does not depend on the clock, its weights byte by byte."""
    result = json.loads((run / "result.json").read_text())
    del result["seconds"], result["content_sha256"]
    for point in result["curve"]:
        del point["seconds"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = (run / "model" / "open_clip_model.safetensors").read_bytes()
    return {"result": result, "losses": [(line["step"], line.get("loss"), line.get("evaluation")) for line in lines], "weights": weights}


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the record of checks, which holds times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "checked.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["disk", "limit"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path, mount=request.param) as found:
        yield found


def fill_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, disk: Disk, spare: int, call: int = 1) -> None:
    """Fill the disk when the function is called for the `call`th time; `require_space` finds enough, as if others filled it after that."""
    calls, original = 0, getattr(where, name)

    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            disk.fill(spare)
        return None if name == "require_space" else original(*args, **kwargs)

    monkeypatch.setattr(where, name, checked)


def test_data_on_a_full_disk(full: Disk, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scenes, and a table of images: no half set is left, and the next start makes the whole one."""
    (tmp_path / "source").mkdir()
    rows = ["filepath,caption"]
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "source" / f"{index}.png")
        rows.append(f"{index}.png,a picture {index}")
    (tmp_path / "source" / "table.csv").write_text("\n".join(rows))
    scenes = ["data", "scenes", "--num-train", "96", "--num-val", "12", "--num-test", "12", "--image-size", "32", "--seed", "0"]
    for name, words in {"scenes": scenes, "packed": ["data", "pack", str(tmp_path / "source" / "table.csv")]}.items():
        out = full.path / name
        full.fill(spare=32 * 1024)
        line = refused([*words, "--out", str(out)], capsys, *FULL)
        assert f"mmlg: error: {out}: " in line
        full.clear()
        assert not [path for path in full.path.iterdir() if name in path.name]
        assert main([*words, "--out", str(out)]) == 0
        assert main([*words, "--out", str(tmp_path / name)]) == 0
        assert contents(out) == contents(tmp_path / name)
    assert contents(full.path / "scenes") == contents(made / "data")


PLACES: dict[str, tuple[Any, str, int, int, str]] = {
    # module, function, call, spare, what the line names
    "the first checkpoint": (checkpoint, "require_space", 2, 32 * 1024, "checkpoints/step-00000003"),
    "the second checkpoint": (checkpoint, "require_space", 3, 32 * 1024, "checkpoints/step-00000006"),
    "metrics.jsonl": (loop, "train_step", 1, 0, "metrics.jsonl"),
    "export": (bundle, "require_space", 1, 8 * 1024, "run/model"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_on_a_disk_that_fills_up_resumes_to_the_same_numbers(
    place: str, full: Disk, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, function, call, spare, named = PLACES[place]
    run = full.path / "run"
    with monkeypatch.context() as patched:
        fill_at(patched, module, function, full, spare, call)
        line = refused(train(made, run), capsys, *FULL)
    full.clear()
    assert named in line, line
    saved = [path.name for path in run.glob("checkpoints/*") if path.is_dir()]
    expected = {"the second checkpoint": ["step-00000003"], "export": ["step-00000003", "step-00000006"]}
    assert sorted(saved) == expected.get(place, [])
    assert not (run / "model").exists()
    assert not (run / "result.json").exists()
    assert main(train(made, run)) == 0
    assert numbers(run) == numbers(made / "run")


def test_a_disk_that_is_full_from_the_start_is_noticed_before_training(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    assert "a checkpoint needs" in refused(train(made, tmp_path / "run"), capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("spare", [8 * 1024, 24 * 1024])
def test_kept_features_on_a_full_disk(
    spare: int, full: Disk, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full for the first block; full for the file of captions' features, which is larger than the block of images'."""
    out = full.path / "features"
    with monkeypatch.context() as patched:
        fill_at(patched, features, "require_space", full, spare)
        line = refused(keep_features(made, out), capsys, *FULL)
    assert f"mmlg: error: {out}/" in line
    full.clear()
    assert not (out / "result.json").exists()
    assert main(keep_features(made, out)) == 0
    for name in ("image.npy", "text.npy", "captions.npy"):
        assert (out / name).read_bytes() == (made / "features" / name).read_bytes()


def write_family(folder: Path) -> None:
    golden = json.loads((Path(__file__).parent / "family_golden.json").read_text())
    (folder / "family.json").write_text(json.dumps(golden["before"]))


def test_a_report_on_a_full_disk(full: Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_family(full.path)
    assert main(["report", str(full.path)]) == 0
    before = contents(full.path)
    full.fill(spare=4096)
    line = refused(["report", str(full.path)], capsys, *FULL)
    assert f"mmlg: error: {full.path / 'report.html'}: " in line
    full.clear()
    assert contents(full.path) == before


def writers(made: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Every command that writes to --out."""
    recipe, data, model = str(made / "recipe.yaml"), str(made / "data"), str(made / "run" / "model")
    common = [recipe, "--data.path", data]
    return {
        "data scenes": lambda out: ["data", "scenes", "--num-train", "8", "--num-val", "4", "--num-test", "4", "--out", str(out)],
        "train": lambda out: train(made, out),
        "extract": lambda out: ["extract", *common, "--ancestor-model", model, "--out", str(out)],
        "features": lambda out: keep_features(made, out),
        "family": lambda out: ["family", *common, "--out", str(out)],
        "eval": lambda out: ["eval", model, "--data", data, "--out", str(out)],
    }


@pytest.mark.parametrize("command", ["data scenes", "train", "extract", "features", "family", "eval"])
def test_folders_that_cannot_be_written_to(command: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without permission, below a file, with a name that is too long; and on a read-only file system, where one can be mounted."""
    words = writers(made)[command]
    with unprivileged_folder(0o555) as folder:
        line = refused(words(folder / "out"), capsys, "permission denied. Give another path")
        assert str(folder) in line
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused(words(tmp_path / "file" / "out"), capsys, "is a file, not a folder")
    refused(words(tmp_path / ("x" * 300)), capsys, "the name is too long")
    if command != "eval":  # whose --out is a file
        refused(words(tmp_path / "file"), capsys, f"{tmp_path / 'file'}: a part of this path is a file", "is a file")
    assert (tmp_path / "file").read_text() == "mine"
    with mounted(tmp_path / "read-only", "-t", "tmpfs", "-o", "ro", "tmpfs") as possible:
        if possible:
            line = refused(words(tmp_path / "read-only" / "out"), capsys, "this file system is read-only")
            assert str(tmp_path / "read-only") in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "read-only"]


def test_inputs_that_may_not_be_read(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    with unprivileged_folder(0o000) as folder:
        for words in (["report", str(folder)], ["eval", str(folder / "model"), "--data", str(made / "data")]):
            assert str(folder) in refused(words, capsys, "ermission denied")


def test_names_and_captions_that_cannot_be_encoded(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", os.fsdecode(b"b\xff")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / "classes" / name / f"{index}.png")
    line = refused(["data", "pack", str(tmp_path / "classes"), "--out", str(tmp_path / "set")], capsys, "is not valid Unicode")
    assert r"b\udcff" in line
    assert not (tmp_path / "set").exists()
    # A folder of such a name is as good as any other, and is told of as well as it can be.
    out = tmp_path / os.fsdecode(b"out\xff")
    assert main(train(made, out)) == 0
    assert numbers(out) == numbers(made / "run")


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_a_console_of_another_encoding(encoding: str, tmp_path: Path) -> None:
    """What it cannot show is written as an escape; the command does its work."""
    folder = tmp_path / "Ωmega"
    folder.mkdir()
    write_family(folder)
    code = "import sys; from mmlg_scale.cli import main; sys.exit(main(['report', sys.argv[1]]))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"\\u03a9mega/report.html\n")
    assert (folder / "report.html").exists()


def test_a_reader_that_has_gone_and_an_output_that_is_full() -> None:
    argv = [sys.executable, "-m", "mmlg_scale", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
    with open("/dev/full", "wb") as device:
        done = subprocess.run(argv, stdout=device, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert done.stderr == b"mmlg: error: the disk is full. Free some space, then start the same command again.\n"


def test_memory_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmlg_scale.data.scenes.write_scenes", lambda *_, **__: np.empty(10**17))
    assert "Unable to allocate" in refused(["data", "scenes", "--out", str(tmp_path / "set")], capsys, "out of memory (")
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**16)
    assert str(in_words(error.value)).startswith("out of memory ([enforce fail at alloc_cpu.cpp")


def test_too_many_open_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_family(tmp_path)
    assert main(["report", str(tmp_path)]) == 0  # what it imports is open no more
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        line = refused(["report", str(tmp_path)], capsys, "too many open files. Raise the limit")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert str(tmp_path / "family.json") in line


def test_every_number_of_the_system_has_words() -> None:
    for number in errno.errorcode:
        line = in_words(OSError(number, os.strerror(number), "/some/path"))
        assert line is not None
        assert line.startswith("/some/path: ")
        assert line.endswith(".")
    assert in_words(ValueError("x")) is None


def test_what_libraries_make_of_a_full_disk(full: Disk) -> None:
    """Their errors get the path, and as much of the cause as they tell."""
    big = torch.zeros(2**18)
    target = full.path / "file"
    full.fill(spare=64 * 1024)
    for write in (lambda: torch.save({"a": big}, target), lambda: save_file({"a": big}, target), lambda: np.save(target, big.numpy())):
        with pytest.raises(OSError, match="Errno") as error, files.writing(target):
            write()
        assert str(in_words(error.value)).startswith(f"{target}: "), error.value
        assert any(words in str(in_words(error.value)) for words in FULL)
        target.unlink(missing_ok=True)
    full.clear()

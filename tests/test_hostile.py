"""Files made to do harm: each attack leaves a canary untouched, ends within seconds, and is one line.

`docs/threat-model.md` says who can hand us what. Data sets are in `data/test_hostile_files.py`. Random damage is in `test_mutations.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmlg_scale import load_learngene, towers
from mmlg_scale.cli import main
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.scenes import write_scenes
from mmlg_scale.errors import UserError
from mmlg_scale.learngene.auxiliary import AuxiliaryCLIP
from mmlg_scale.learngene.file import Learngene
from mmlg_scale.learngene.structure import Structure
from mmlg_scale.records import KEY, write_record
from mmlg_scale.training.trackers import JsonLines
from tests.hostile import DEEP, no_hang, refused  # noqa: F401  # a fixture for every test here
from tests.towers.models import PLAIN, assert_one_line, clip_of, word_tokenizer
from tests.training.tiny import ANY_SIZE

# Recipes

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"    {new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES = {
    "starts a process": ("model: {config: {class_path: subprocess.Popen, init_args: {args: [touch, CANARY]}}}", "embed_dim"),
    "runs by a tag": ("model: {config: !!python/object/apply:os.system ['touch CANARY']}", "is not valid YAML"),
    "billions of values": (f"model:\n  config:\n    {BOMB}", "its aliases written out"),
    "stands for itself": ("model: {config: &a [*a]}", "around itself"),
    "deep": (f"model: {{config: {DEEP}", "nested more than 50 deep"),
    "long": ("# " + "x" * 300_000, "bytes, a recipe has at most"),
    "number of 5000 digits": (f"seed: {'9' * 5000}", "is not valid YAML"),
    "another file as a section": ("model: /etc/hostname", "recipe key model is '/etc/hostname'. Give a mapping of keys."),
    "20,000 layers of a size": ("family: {sizes: [{image_layers: 20000}]}", "a whole number from 1 to 1,000"),
    "20,000 layers of the ancestor": (
        "model: {config: {embed_dim: 8, vision_cfg: {layers: 20000, width: 64}, text_cfg: {width: 64, heads: 1}}}",
        "vision_cfg.layers: '20000' is not a whole number from 1 to 1000",
    ),
    "a width without end": (
        "model: {config: {embed_dim: 8, vision_cfg: {layers: 1000, width: 65536, head_width: 64}, text_cfg: {width: 64, heads: 1}}}",
        "parameters; 50,000,000,000 are supported",
    ),
    "positions without end": (
        "model: {config: {embed_dim: 8, vision_cfg: {width: 1024, image_size: 8192, patch_size: 1}, text_cfg: {width: 64, heads: 1}}}",
        "Use larger patches",
    ),
    "blocks": ("extraction: {num_unimodal: 2000000}", "a whole number from 0 to 256"),
    "knots": ("extraction: {num_knots: 2000000}", "a whole number from 2 to 1,000"),
    "workers": ("runtime: {num_workers: 100000}", "a whole number from 0 to 1,024"),
    "ranks": ("runtime: {num_processes: 1000000}", "a whole number from 1 to 65,536"),
    "scenes": ("data: {scenes: {num_train: 1000000000000}}", "a whole number from 1 to 100,000,000"),
    "batch": ("ancestor: {batch_size: 1000000000000}", "a whole number from 2 to 4,194,304"),
}


@pytest.mark.parametrize("kind", sorted(RECIPES))
@pytest.mark.parametrize("words", [("family",), ("family", "--recipe")])
def test_recipes(kind: str, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    canary, recipe, (text, said) = tmp_path / "canary", tmp_path / "recipe.yaml", RECIPES[kind]
    recipe.write_text(text.replace("CANARY", str(canary)))
    assert said in refused(*words, recipe, "--out", tmp_path / "out", capsys=capsys)
    assert not canary.exists()
    assert not (tmp_path / "out" / "ancestor").exists()


# Learngenes


@pytest.fixture(scope="module")
def gene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = word_tokenizer("a b c")
    spec = towers.ModelSpec(towers.model_config(PLAIN), tokenizer=towers.tokenizer_from_files(files))
    auxiliary = AuxiliaryCLIP.from_ancestor(clip_of(PLAIN).state_dict(), Structure(spec.config, num_knots=2), seed=0)
    file = tmp_path_factory.mktemp("gene") / "learngene.safetensors"
    Learngene.from_auxiliary(auxiliary.structure, auxiliary.state_dict(), spec=spec, extraction={}, trained=ANY_SIZE).save(file)
    return file


def forge(gene: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A learngene with another header, whose digests are right: a stranger can compute them too."""
    with safe_open(gene, framework="pt") as file:
        header = json.loads(file.metadata()["mmlg"])
    header.pop("sha256")
    change(header)
    header["sha256"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    save_file(load_file(gene), out, metadata={"mmlg": json.dumps(header, sort_keys=True)})
    return out


def in_tower(tower: str, **fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["model_config"][tower].update(fields)


def in_tokenizer(**fields: Any) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        files = header["tokenizer_files"]
        files["tokenizer_config.json"] = json.dumps({**json.loads(files["tokenizer_config.json"]), **fields})

    return change


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "writes beside OUT": (lambda header: header["tokenizer_files"].update({"../canary": "x"}), "is not a tokenizer file"),
    "writes anywhere": (lambda header: header["tokenizer_files"].update({"/tmp/canary": "x"}), "is not a tokenizer file"),
    "replaces the export's own file": (
        lambda header: header["tokenizer_files"].update({"open_clip_config.json": "{}"}),
        "is not a tokenizer file",
    ),
    "remote code in the configuration": (in_tower("text_cfg", tokenizer_kwargs={"trust_remote_code": True}), "not supported"),
    "a tokenizer from elsewhere": (in_tower("text_cfg", hf_tokenizer_name="evil/repository"), "not supported"),
    "remote code in the tokenizer": (in_tokenizer(auto_map={"AutoTokenizer": ["code.Evil", None]}), "auto_map"),
    "a class of its own": (in_tokenizer(tokenizer_class="Evil"), "tokenizer_class"),
    "layers": (in_tower("vision_cfg", layers=20_000), "not a whole number from 1 to 1000"),
    "width": (in_tower("text_cfg", width=10**9), "not a whole number from 1 to 65536"),
    "context": (in_tower("text_cfg", context_length=10**9), "not a whole number from 1 to 16384"),
    "vocabulary": (in_tower("text_cfg", vocab_size=10**12), "not a whole number"),
    "patches": (in_tower("vision_cfg", image_size=8192, patch_size=1, width=4096), "Use larger patches"),
    "blocks": (lambda header: header["structure"].update(num_unimodal=10**9), "not a whole number from 0 to 256"),
    "knots": (lambda header: header["structure"].update(num_knots=10**9), "not a whole number from 2 to 1000"),
    "rank": (lambda header: header["structure"].update(embedding_rank=10**9), "not a whole number from 1 to"),
    "a rank that is no number": (lambda header: header["structure"].update(embedding_rank=True), "not a whole number from 1 to"),
    "numbers of another type": (lambda header: header.update(dtype="bf16"), "holds float32 numbers, not bfloat16"),
    "numbers of an unknown type": (lambda header: header.update(dtype=["fp64"]), "its header is damaged"),
    "a setting that there is not": (lambda header: header["structure"].update(config={}), "its header is damaged"),
    "deep": (lambda header: header.update(extraction=json.loads("[" * 300 + "]" * 300)), "nested too deeply"),
}


@pytest.mark.parametrize("kind", sorted(HEADERS))
def test_learngenes(kind: str, gene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = HEADERS[kind]
    (tmp_path / "inner").mkdir()
    forged, out = forge(gene, tmp_path / "forged.safetensors", change), tmp_path / "inner" / "out"
    assert said in refused("descend", forged, "--image-layers", 1, "--text-layers", 1, "--out", out, capsys=capsys)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["forged.safetensors", "inner"]


def test_sizes_on_the_command_line(gene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("descend", gene, "--out", tmp_path / "out", "--text-layers", "1", "--image-layers")
    assert "20000 is not a valid depth. Use 1 to 1000." in refused(*words, "20000", capsys=capsys)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**10 if name == "SC_PAGE_SIZE" else 16)
    assert "GiB of memory, this machine has 0. Use fewer." in refused(*words, "1000", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_every_byte_of_a_learngene_counts(gene: Path, tmp_path: Path) -> None:
    """110 bytes spread over the whole file: each is refused, or changes nothing that is read."""
    content, whole, refusals = gene.read_bytes(), load_learngene(gene), 0
    for at in np.linspace(8, len(content) - 1, 110).astype(int):
        (tmp_path / "gene.safetensors").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            found = load_learngene(tmp_path / "gene.safetensors")
        except UserError:
            refusals += 1
            continue
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
        assert (found.spec.digest(), found.extraction, found.trained) == (whole.spec.digest(), whole.extraction, whole.trained)
    assert refusals > 100


def test_numbers_of_a_learngene_are_finite(gene: Path, tmp_path: Path) -> None:
    whole = load_learngene(gene)
    tensors = {name: tensor.clone() for name, tensor in whole.tensors.items()}
    tensors["unimodal_text"][0, 3] = float("inf")
    Learngene(tensors, whole.structure, whole.spec, whole.extraction, whole.trained).save(tmp_path / "inf.safetensors")
    assert_one_line(lambda: load_learngene(tmp_path / "inf.safetensors"), "inf.safetensors", "unimodal_text holds numbers that are NaN")


def test_a_learngene_of_the_earlier_version_is_read_and_said_to_be(gene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = forge(gene, tmp_path / "three.safetensors", lambda header: header.update(version=3) or header.pop("tensors_sha256"))
    found, whole = load_learngene(earlier), load_learngene(gene)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert "of version 3 and has no SHA-256 of its tensors" in capsys.readouterr().err
    missing = forge(gene, tmp_path / "four.safetensors", lambda header: header.pop("tensors_sha256"))
    assert_one_line(lambda: load_learngene(missing), "four.safetensors", "do not match the SHA-256")


# Models


@pytest.fixture
def model(tmp_path: Path) -> Path:
    spec = towers.ModelSpec(towers.model_config(PLAIN), tokenizer=towers.tokenizer_from_files(word_tokenizer("a b c")))
    towers.export(towers.Bundle(spec, clip_of(PLAIN).state_dict()), tmp_path / "model")
    return tmp_path / "model"


# Anything that is no regular file


def make_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def make_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


SPECIAL = {"pipe": make_fifo, "socket": make_socket, "device": make_device}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile") / "scenes"
    write_scenes(root, num_train=8, num_val=4, num_test=4, seed=0, image_size=32)
    return root


@pytest.mark.parametrize("kind", sorted(SPECIAL))
def test_what_is_no_regular_file_is_never_waited_for(
    kind: str, gene: Path, model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, out = SPECIAL[kind], tmp_path / "out"
    places: dict[str, tuple[str | Path, ...]] = {
        "recipe.yaml": ("family", tmp_path / "recipe.yaml", "--out", out),
        "gene.safetensors": ("descend", tmp_path / "gene.safetensors", "--image-layers", "1", "--text-layers", "1", "--out", out),
        "table.csv": ("data", "pack", tmp_path / "table.csv", "--out", out),
        "pairs.json": ("data", "pack", tmp_path / "pairs.json", "--images", tmp_path, "--out", out),
        "model/open_clip_config.json": ("eval", model, "--data", scenes),
        "model/mmlg.json": ("eval", model, "--data", scenes),
        "model/open_clip_model.safetensors": ("eval", model, "--data", scenes),
        "model/tokenizer.json": ("eval", model, "--data", scenes),
        "tokenizer.json": ("data", "index", scenes / "train", "--tokenizer", tmp_path / "tokenizer.json"),
    }
    for name, words in places.items():
        file = tmp_path / name
        before = file.read_bytes() if file.exists() else None
        make(file)
        refused(*words, capsys=capsys)
        file.unlink()
        if before is not None:
            file.write_bytes(before)
    (tmp_path / "images.csv").write_text("filepath,caption\nimage.png,x\n")
    make(tmp_path / "image.png")
    assert "row 2: no image" in refused("data", "pack", tmp_path / "images.csv", "--out", out, capsys=capsys)
    assert not out.exists()


@pytest.mark.parametrize("kind", sorted(SPECIAL))
def test_shards_that_are_no_files(kind: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "data"
    copied.mkdir()
    for path in scenes.rglob("*"):
        target = copied / path.relative_to(scenes)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    SPECIAL[kind](copied / "test" / "shard-000000.tar")
    spec = towers.ModelSpec(towers.model_config(PLAIN))
    with pytest.raises(UserError, match=r"4 damaged samples \(read error 4\)"):
        Corpus(open_pairs(copied), spec).eval_split("test")
    assert main(["data", "check", str(copied)]) == 1
    SPECIAL[kind](tmp_path / "raw.tar")
    assert "raw.tar cannot be read" in refused("data", "index", tmp_path, "--val-shards", 0, "--test-shards", 0, capsys=capsys)


# Symbolic links where we write


def test_links_where_we_write_are_not_followed(tmp_path: Path) -> None:
    from mmlg_launchers import LocalLauncher, Resources

    from mmlg_scale.data.faults import append_faults
    from mmlg_scale.data.reader import Fault
    from mmlg_scale.files import write_bytes_atomic
    from mmlg_scale.training.folder import hold

    canary, out = tmp_path / "canary", tmp_path / "out"
    canary.write_text("untouched")
    out.mkdir()
    for name in (".lock", "metrics.jsonl", "data-faults-rank0.jsonl", "log.txt", "state.json", ".state.json.tmp", "result.json"):
        (out / name).symlink_to(canary)
    with pytest.raises(OSError, match="symbolic link"):
        JsonLines(out).scalars(1, {"loss": 1.0}, kind="training")
    with pytest.raises(OSError, match="symbolic link"):
        append_faults(out / "data-faults-rank0.jsonl", [Fault("a", "b", 0, "c", "d")], epoch=0, step=0)
    with pytest.raises(OSError, match="symbolic link"), hold(out):
        pass
    with pytest.raises(OSError, match="symbolic link"):
        LocalLauncher().submit(["true"], Resources(), out)
    (out / "log.txt").unlink()
    LocalLauncher().submit(["true"], Resources(), out).wait()
    write_bytes_atomic(out / "result.json", b"{}")
    assert not (out / "result.json").is_symlink()
    assert canary.read_text() == "untouched"


# JSON anywhere


@pytest.mark.parametrize("text", [DEEP, '{"a": ' + DEEP, '{"a": ' * 200 + "1" + "}" * 200], ids=["list", "object", "200 deep"])
def test_deep_json_in_every_record(text: str, model: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places: dict[Path, tuple[str | Path, ...]] = {
        tmp_path / "family" / "family.json": ("report", tmp_path / "family"),
        model / "open_clip_config.json": ("eval", model, "--data", scenes),
        model / "mmlg.json": ("eval", model, "--data", scenes),
        model / "tokenizer.json": ("eval", model, "--data", scenes),
        model / "tokenizer_config.json": ("eval", model, "--data", scenes),
        tmp_path / "set" / "dataset.json": ("data", "scenes", "--out", tmp_path / "set"),
        tmp_path / "set" / "train" / "manifest.json": ("data", "check", tmp_path / "set"),
    }
    for path, words in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        path.write_text(text)
        assert path.name in refused(*words, capsys=capsys)
        path.unlink()
        if before is not None:
            path.write_bytes(before)


def test_a_record_that_was_changed_says_so(tmp_path: Path) -> None:
    from mmlg_scale.records import read_record

    file, content = tmp_path / "result.json", {"flops": 1234, "metrics": {"acc1": 0.5}}
    write_record(file, content)
    assert read_record(file, "record", "Again.") == content
    whole = file.read_text()
    file.write_text(whole.replace("1234", "1235"))
    said = assert_one_line(lambda: read_record(file, "record", "Again."), "result.json", "does not match its SHA-256")
    assert KEY in said
    file.write_text(json.dumps({"flops": 1235}))
    assert read_record(file, "record", "Again.") == {"flops": 1235}

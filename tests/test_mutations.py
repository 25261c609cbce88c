"""Every file that a command reads, cut, changed in one byte, emptied, or with the content of its neighbour.

Each time the command refuses in one line, computes the very same numbers as without the change, or, where a configuration that people edit
by hand was changed, says so in one line. No traceback, no hang, nothing silent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmlg_scale import load_learngene, towers
from mmlg_scale.cli import main
from mmlg_scale.data.corpus import Corpus, open_pairs
from mmlg_scale.data.faults import known_faults
from mmlg_scale.data.pipeline import StreamSettings, TrainStream
from mmlg_scale.data.reader import ShardReader
from mmlg_scale.errors import UserError
from mmlg_scale.records import KEY
from mmlg_scale.towers.bundle import CONFIG_FILE
from mmlg_scale.training.folder import result_of
from mmlg_scale.training.inputs import inputs_of
from mmlg_scale.training.roles import AncestorRole, Context, features_identity, kept_teacher
from mmlg_scale.training.run import run_role
from mmlg_scale.training.teacher import CachedTeacher
from tests.artefacts import RUNTIME, Artefacts
from tests.test_hostile import forge

SECONDS = 60
"""For any one command; each takes one at most."""
NUMBER, SEEDED = 500, 60
OTHER = "other numbers, silently"


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    return Artefacts(tmp_path_factory.mktemp("artefacts"))


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Interrupt what hangs."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def command(*words: str | Path) -> None:
    """A command as the user gives it; its one line is raised again."""
    code = main([*map(str, words), "--debug"])
    assert code in (0, 1), code


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def of_arrays(*arrays: Any) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def untimed(value: Any) -> Any:
    """A result without what the clock decides."""
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key != "seconds"}
    return [untimed(item) for item in value] if isinstance(value, list) else value


class Readers:
    """Kind of artefact -> what a command that reads it comes to."""

    def __init__(self, made: Artefacts, scratch: Path) -> None:
        self.made, self.scratch = made, scratch

    def model(self, folder: Path) -> Any:
        command("eval", folder, "--data", self.made.data, "--out", self.scratch / "metrics.json")
        return towers.load_clip(folder).digest(), json.loads((self.scratch / "metrics.json").read_text())

    def gene(self, folder: Path) -> Any:
        out = self.scratch / "written"
        shutil.rmtree(out, ignore_errors=True)
        command("descend", folder / "learngene.safetensors", "--image-layers", "3", "--text-layers", "1", "--out", out)
        gene = load_learngene(folder / "learngene.safetensors")
        return towers.load_clip(out).digest(), gene.trained, gene.extraction, gene.spec.digest()

    def data(self, folder: Path) -> Any:
        """Counted as damaged, and so told on the console, is as good as refused."""
        command("data", "check", folder)
        corpus = Corpus(open_pairs(folder), self.made.spec)
        test = corpus.eval_split("test")
        reader = ShardReader(folder / "train")
        bad = known_faults(folder / "train", reader, check="decode", max_bad_fraction=0.01, record=None, rank=0, threads=1, shared=False)
        if bad or test.skipped:
            raise UserError("counted")
        texts = [reader.about(index) for index in range(len(reader))]
        pixels = [reader.image(index, 32) for index in range(len(reader))]
        return (
            of_arrays(test.images_uint8_NCHW(), test.texts_MT(), *pixels),
            list(test.captions),
            texts,
            corpus.classes,
            corpus.pairs.tokenizer.identity,
        )  # type: ignore[union-attr]

    def run(self, folder: Path) -> Any:
        result = run_role(AncestorRole(self.made.settings), folder, RUNTIME)
        assert result_of(folder) == result
        return untimed(result), towers.load_clip(folder / "model").digest()

    under_way = run

    def features(self, folder: Path) -> Any:
        pairs = open_pairs(self.made.data)
        teacher = CachedTeacher(folder, self.made.spec, features_identity(self.made.keeping, pairs, self.made.model))
        return of_arrays(teacher._image, teacher._text, teacher._starts), teacher.cost, teacher._logits

    def pool(self, folder: Path) -> Any:
        """Every row, as an adaptation reads them."""
        settings, pairs, device = self.made.reusing, open_pairs(self.made.data), torch.device("cpu")
        context, model = Context(pairs, RUNTIME, device), towers.load_clip(self.made.model)
        with one_rank():
            teacher = kept_teacher(settings, context, model, self.made.model, "mmlg", folder / "learngene.safetensors")
            stream = TrainStream(self.made.data / "train", model.spec, StreamSettings(global_batch_size=8, seed=settings.seed, pool=24))
            inputs = [inputs_of(batch, model.spec.preprocess, device, text="full") for batch in islice(stream, 3)]
            outputs = [teacher(batch, contextlib.nullcontext, settings.adaptation.loss.hidden_depths) for batch in inputs]
        return of_arrays(*(hidden.float() for found in outputs for name in ("image_hidden", "text_hidden") for hidden in found[name]))

    def family(self, folder: Path) -> Any:
        command("report", folder)
        return (folder / "report.html").read_text()


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file; returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "report.html"))
    file = rng.choice(files)
    content, kind = file.read_bytes(), rng.choice(("cut", "flip", "flip", "flip", "empty", "swap"))
    if kind == "cut":
        file.write_bytes(content[: rng.randrange(max(1, len(content)))])
    elif kind == "empty" or not content:
        file.write_bytes(b"")
    elif kind == "flip":
        # Half of them in the first kilobyte, where headers are.
        at = rng.randrange(min(len(content), 1024) if rng.random() < 0.5 else len(content))
        value = content[at] ^ rng.randrange(1, 256)
        file.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
        kind = f"flip byte {at} from {content[at]} to {value}"
    else:
        other = rng.choice(files)
        kind = f"swap with {other.relative_to(folder)}"
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    return f"{file.relative_to(folder)}: {kind}"


KINDS = ("model", "gene", "data", "run", "under_way", "features", "pool", "family")


@pytest.fixture(scope="module")
def expected(artefacts: Artefacts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each reader comes to where nothing is changed."""
    root = tmp_path_factory.mktemp("unchanged")
    readers, found = Readers(artefacts, root), {}
    for kind in KINDS:
        shutil.copytree(getattr(artefacts, kind), root / kind)
        found[kind] = getattr(readers, kind)(root / kind)
    return found


def outcome(read: Callable[[Path], Any], folder: Path, wanted: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """`refused`, `same`, `said` or what else came of it."""
    capsys.readouterr()
    try:
        with at_most(SECONDS):
            found = read(folder)
    except UserError as error:
        message = str(error)
        return "refused" if message.isprintable() and len(message) < 1500 else f"not one line: {message!r}"
    except BaseException as error:  # everything else is a fault
        if dist.is_initialized():
            dist.destroy_process_group()
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}"
    lines = [line for line in capsys.readouterr().err.splitlines() if "has changed since it was exported" in line]
    if found == wanted:
        return "same"
    return "said" if len(lines) == 1 and lines[0].startswith(f"mmlg: {folder}/") else OTHER


def unsign(folder: Path) -> None:
    """As files of earlier versions and from elsewhere are: without any SHA-256."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        if file.name == "mmlg.json":
            file.unlink()
        elif file.suffix == ".json":
            content = json.loads(file.read_text())
            for key in (KEY, "tokenizer" if file.name == "dataset.json" else KEY, "files"):
                content.pop(key, None)
            file.write_text(json.dumps(content))
        elif file.name == "learngene.safetensors":
            forge(file, file, lambda header: header.update(version=3) or header.pop("tensors_sha256"))
        elif file.suffix == ".safetensors":
            save_file(load_file(file), file)


def check(
    artefacts: Artefacts,
    expected: dict[str, Any],
    tmp_path: Path,
    seeds: range,
    capsys: pytest.CaptureFixture[str],
    *,
    signed: bool = True,
) -> None:
    """Where nothing is signed, other numbers are no fault, but anything else than a line is."""
    kinds = KINDS if signed else tuple(kind for kind in KINDS if kind != "under_way")  # checkpoints have one version
    readers, faults, refused = Readers(artefacts, tmp_path), [], 0
    for seed in seeds:
        rng, kind, folder = random.Random(seed), kinds[seed % len(kinds)], tmp_path / f"{seed}"
        shutil.copytree(getattr(artefacts, kind), folder)
        if not signed:
            unsign(folder)
        done = mutate(folder, rng)
        found = outcome(getattr(readers, kind), folder, expected[kind], capsys)
        refused += found == "refused"
        allowed = ("refused", "same", "said" if CONFIG_FILE in done else "", "" if signed else OTHER)
        if found not in allowed:
            faults.append(f"seed {seed}: {kind}: {done}: {found}")
        shutil.rmtree(folder)
    assert not faults, "\n".join(faults)
    assert refused > len(seeds) // (2 if signed else 5)  # the commands do read what is changed


def test_some_mutations(artefacts: Artefacts, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(artefacts, expected, tmp_path, range(SEEDED), capsys)


def test_some_mutations_of_what_has_no_digest(
    artefacts: Artefacts, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(artefacts, expected, tmp_path, range(SEEDED // 2), capsys, signed=False)


@pytest.mark.slow
def test_many_mutations(artefacts: Artefacts, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(artefacts, expected, tmp_path, range(NUMBER), capsys)


@pytest.mark.slow
def test_many_mutations_of_what_has_no_digest(
    artefacts: Artefacts, expected: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(artefacts, expected, tmp_path, range(NUMBER), capsys, signed=False)

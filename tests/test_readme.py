"""The README and docs as a reader would follow them: its commands and its Python, in its order, on a small data set."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mmlg_scale.cli import main
from tests.conftest import Parsed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
FEW = {"steps": 2, "batch_size": 8, "eval_every": 2}
RECIPE = {
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 3},
            "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 3},
        }
    },
    "ancestor": FEW,
    "extraction": {"num_knots": 3, "training": FEW},
    "pretraining": {"num_knots": 3, "training": FEW},
    "baselines": {"scratch": FEW, "even": None, "distil": None},
    "family": {"sizes": [{"image_layers": 2, "text_layers": 2}]},
}


def commands(text: str) -> list[str]:
    """The command lines of indented blocks, without their comments and redirections."""
    lines = [line.strip().partition(" > ")[0] for line in text.splitlines() if re.match(r"    (mmlg|make) ", line)]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def make_pairs(folder: Path) -> None:
    """pairs.csv as the README describes it: 40 images of one colour each."""
    rows = ["filepath,caption"]
    for number in range(40):
        Image.new("RGB", (32, 32), (number * 6, 255 - number * 6, number * 3)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,colour number {number}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")


def test_the_readme_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mmlg command and every line of Python, in order; `family demo` and the 2-rank run have tests of their own."""
    make_pairs(tmp_path)
    (tmp_path / "my-recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    ran = [words for words in commands(README) if words.startswith("mmlg ") and "--help" not in words]
    assert len(ran) >= 6
    for words in ran:
        assert main(shlex.split(words)[1:]) == 0, words
    for block in python_blocks(README):
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "smaller" / "open_clip_config.json").is_file()
    assert (tmp_path / "runs" / "ancestor" / "result.json").is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_every_command_that_is_shown_parses(page: Path, parse_only: None) -> None:
    """And what is made is in the Makefile."""
    for words in commands(page.read_text(encoding="utf-8")):
        program, *rest = shlex.split(words)
        if program == "make":
            assert subprocess.run(["make", "--dry-run", rest[0]], cwd=ROOT, capture_output=True, check=False).returncode == 0, words
        elif rest[0] == "recipe" or "--help" in rest:
            assert main(rest) == 0, words
        else:
            for command in (rest, rest[rest.index("--") + 1 :]) if "--" in rest else (rest,):
                with pytest.raises(Parsed):
                    main(command)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page",
    sorted(page for page in ROOT.rglob("*.md") if not {".venv", "runs"} & set(page.parts)),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_no_page_has_what_a_merge_left(page: Path) -> None:
    assert not re.search(r"^(<<<<<<<|=======|>>>>>>>)", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_readme_stays_short() -> None:
    assert README.count("\n") < 150
    assert {page.stem for page in DOCS} >= {"quickstart", "recipes", "data", "models", "operations", "cost", "threat-model"}

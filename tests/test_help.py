"""What `--help` says: short, with examples that parse, quick, and with every recipe field in one place."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlg_scale.cli import main
from mmlg_scale.cli.main import COMMANDS
from mmlg_scale.recipe import Recipe
from mmlg_scale.recipe_file import SHIPPED, load_recipe
from mmlg_scale.recipe_help import in_words, sections
from mmlg_scale.runtime import Runtime
from tests.conftest import Parsed


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main([*words, "--help"])
    except SystemExit as ended:
        code = ended.code or 0
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def examples(said: str) -> list[list[str]]:
    """The commands at the end of a help text, as words behind `mmlg`."""
    listed = said.partition("\nexamples:\n")[2].replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in listed.splitlines() if line.strip()]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "recipe"])
def test_help_is_short_and_its_examples_parse(command: str, parse_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    said = help_of(command.split(), capsys)
    lines = said.splitlines()
    assert len(lines) < 60
    assert lines[0].startswith(f"usage: mmlg {command}")
    assert lines[1] == ""  # the usage is one line
    assert "<function" not in said
    assert ("RECIPE " in said) == ("--print-config" in said)
    found = examples(said)
    assert len(found) == 2
    for words in found:
        with pytest.raises(Parsed):
            main(words)
        if "--" in words:  # what a launcher runs is a command too
            with pytest.raises(Parsed):
                main(words[words.index("--") + 1 :])
    assert command.split() in [words[: len(command.split())] for words in found]


def test_an_example_that_does_not_parse_would_be_found(parse_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--outt", "runs/x"]) == 2
    assert "--outt" in capsys.readouterr().err


def test_help_of_recipe_commands_is_quick() -> None:
    """What makes it quick: neither torch nor the recipe's hundreds of options."""
    script = (
        "import sys\nfrom mmlg_scale.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'open_clip', 'deepspeed', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def fields_of(cls: type, prefix: str) -> Iterator[str]:
    """Dotted keys of every field of a dataclass that is none itself."""
    for name, kind in typing.get_type_hints(cls).items():
        parts = (kind, *typing.get_args(kind))
        parts += tuple(inner for part in parts for inner in typing.get_args(part))
        inner = [part for part in parts if dataclasses.is_dataclass(part)]
        is_list = any(typing.get_origin(part) is list for part in parts)
        if inner:
            yield from fields_of(inner[0], f"{prefix}{name}{'[]' if is_list else ''}.")
        else:
            yield prefix + name


def test_every_recipe_field_is_in_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    shown: Counter[str] = Counter()
    for name in sections():
        assert main(["recipe", "--help", *([name] if name else [])]) == 0
        shown.update(line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and len(line.split()) == 1)
    fields = [*fields_of(Recipe, ""), *fields_of(Runtime, "runtime.")]
    assert len(fields) > 150
    assert {key: shown[key] for key in fields} == dict.fromkeys(fields, 1)


def test_a_section_says_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--help", "extraction.training"]) == 0
    said = capsys.readouterr().out
    assert "  extraction.training.batch_size\n" in said
    assert "default: 128\n      Pairs per step over all ranks; with data.captions_per_image, images.\n" in said
    assert "extraction.training.optimizer.beta2\n      a number from 0 to below 1; default: 0.98\n" in said
    assert main(["recipe", "--help", "adaptation.loss"]) == 0
    assert "adaptation.loss.feature\n      a number of 0 or more; default: 4.0\n" in capsys.readouterr().out  # not the class's 8.0
    assert main(["recipe", "--help", "data.augment"]) == 0  # a single field
    assert "one of none, crop, resized_crop; default: none" in capsys.readouterr().out
    assert main(["recipe", "--help", "family.sizes"]) == 0
    assert "[{image_layers: 2, text_layers: 2}" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "near"), [("extration", "extraction"), ("runtime.num_worker", "runtime.num_workers")])
def test_an_unknown_section_names_the_nearest(asked: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--help", asked]) == 2
    assert capsys.readouterr().err == (
        f"mmlg: error: a recipe has no section {asked!r}. Did you mean {near!r}? mmlg recipe --help lists the sections.\n"
    )


def test_recipe_lists_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n{path.stem}" in f"\n{listed}" for path in SHIPPED.glob("*.yaml"))
    assert main(["recipe", "show", "vit-b-32", "--extraction.training.steps", "2000"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    settings, _ = load_recipe(str(file))
    assert (settings.model.architecture, settings.extraction.training.steps) == ("ViT-B-32", 2000)
    assert main(["recipe", "show"]) == 2
    assert main(["recipe", "sho", "demo"]) == 2
    assert len(help_of(["recipe"], capsys).splitlines()) < 60


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"mmlg {command}" in said for command in COMMANDS if command.startswith("data "))


def test_types_in_words() -> None:
    assert in_words(typing.Literal["a", 2]) == "one of a, 2"
    assert in_words(list[str] | None) == "a list, each a text, or null"
    assert in_words(dict[str, Any]) == "a mapping of keys"

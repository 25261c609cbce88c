"""What tests share. Before any test module is imported: where there is no GPU, Triton's kernels run in Triton's interpreter.

Triton reads the variable when it is first imported, which the module of an unrelated test may do.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

import mmlg_scale

# Same commit, same examples, same verdict. To look for new ones: pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class Parsed(Exception):
    """A command line has been parsed; what it would do is not done."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands raise `Parsed` instead of running; my-recipe.yaml is there."""
    import jsonargparse

    parse_args = jsonargparse.ArgumentParser.parse_args

    def parse_and_stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = parse_args(self, *args, **kwargs)
        raise Parsed(found)

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(tmp_path)
    demo = Path(mmlg_scale.__file__).parent / "recipes" / "demo.yaml"
    (tmp_path / "my-recipe.yaml").write_text(demo.read_text())

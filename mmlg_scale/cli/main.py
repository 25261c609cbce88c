"""`mmlg COMMAND`: finds the command's module and turns a user's mistake into one line. Imports nothing heavy."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence

from mmlg_scale.cli.parsing import nearest
from mmlg_scale.errors import UserError

HELP = """usage: mmlg COMMAND ...

Train one big CLIP, distil a small learngene out of it, write CLIPs of any depth from that.

The whole job, from image-text shards to a report:
  mmlg family demo --out runs/demo          (demo: a shipped recipe; or your own YAML file)

Step by step:
  mmlg data scenes --out DIR                write the procedural image-text set as webdataset shards
  mmlg data pack SOURCE --out DIR           pack your CSV/TSV (filepath,caption), COCO or Karpathy JSON, or folder per class
  mmlg data index DIR                       make a data set of shards from elsewhere, without touching them
  mmlg data check DIR                       compare every byte with its checksum and read every sample
  mmlg train RECIPE --data.path DIR --out DIR
                                            train the ancestor
  mmlg extract RECIPE --data.path DIR --ancestor-model DIR --out DIR
                                            distil the learngene
  mmlg pretrain RECIPE --data.path DIR --out DIR
                                            or train a learngene directly on the pairs, without an ancestor
  mmlg features RECIPE --data.path DIR --ancestor-model DIR --out DIR
                                            keep the ancestor's features, for recipes with engine.keep_features
  mmlg descend LEARNGENE --image-layers A --text-layers B --out DIR
                                            write a descendant as an ordinary open_clip model
  mmlg train RECIPE --init mmlg|direct|tleg|sws|scratch|even|distil --image-layers A --text-layers B ...
                                            train a descendant or a baseline
  mmlg eval MODEL --data DIR                retrieval and zero-shot metrics of any open_clip folder
  mmlg report DIR                           draw a family's report.html again

Before and around a run:
  mmlg recipe                               list the shipped recipes; mmlg recipe --help lists the fields of a recipe
  mmlg plan RECIPE                          the steps of mmlg family: parameters, FLOPs, memory, disk, time
  mmlg launch local --num-processes N -- <any mmlg command>
  mmlg doctor                               check this machine, and say what to do about what is missing

Every command has --help. Commands that take a RECIPE take every field of it as an option
(--extraction.training.steps 200); --print-config prints the recipe with all its fields.
A mistake in what you give is one line and exit code 2; --debug adds the traceback.
"""

# Command -> module and function, imported when the command is called.
COMMANDS = {
    "data scenes": "data:scenes",
    "data pack": "data:pack",
    "data index": "data:index",
    "data check": "data:check",
    "train": "runs:train",
    "extract": "runs:extract",
    "pretrain": "runs:pretrain",
    "features": "runs:features",
    "family": "runs:family",
    "plan": "runs:plan",
    "recipe": "recipes:recipe",
    "descend": "models:descend",
    "eval": "models:evaluate",
    "report": "models:report",
    "launch local": "machine:launch_local",
    "doctor": "machine:doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 the user's mistake)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments and "--" not in arguments[: arguments.index("--debug")]
    if debug:
        arguments.remove("--debug")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line  # type: ignore[assignment]
            return _command(arguments)
    except UserError as error:
        if debug:
            raise
        print(f"mmlg: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mmlg: interrupted; start the same command again to resume.", file=sys.stderr)
        return 130


def _one_line(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Our own warnings are for the user, as a line; those of libraries are for developers."""
    if category.__module__.startswith("mmlg_"):
        print(f"mmlg: warning: {message}", file=sys.stderr)


def _command(arguments: list[str]) -> int:
    words = 2 if arguments[0] in ("data", "launch") and len(arguments) > 1 and not arguments[1].startswith("-") else 1
    name = " ".join(arguments[:words])
    if name in ("data", "launch"):
        choices = [key for key in COMMANDS if key.startswith(f"{name} ")]
        print(f"usage: mmlg {name} COMMAND ...\n\nOne of these; each has --help:\n  " + "\n  ".join(f"mmlg {key}" for key in choices))
        return 0 if arguments[1:] in (["-h"], ["--help"]) else 2
    if name not in COMMANDS:
        raise UserError(f"no command {name!r}.{nearest(name, list(COMMANDS))} See mmlg --help.")
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(f"mmlg_scale.cli.{module}"), function)(arguments[words:])

"""`mmlg COMMAND`: finds the command's module; mistakes and what the machine refuses end here as one line. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import select
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO

from mmlg_scale.cli.parsing import nearest
from mmlg_scale.errors import FollowingError, RunStopped, UserError, in_words

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
                                            or train a learngene directly on the pairs, without an ancestor;
                                            --learngene FILE trains an extracted one further
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
  mmlg launch slurm --cluster FILE --nodes N --gpus-per-node G -- <any mmlg command>
  mmlg launch status|logs|cancel DIR        look after what was launched
  mmlg launch check --cluster FILE --nodes N
                                            look at nodes before days of work are trusted to them
  mmlg benchmark RECIPE --out DIR           samples/s, MFU, loader stall and memory of training steps
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
    "launch local": "launch:local",
    "launch slurm": "launch:slurm",
    "launch status": "launch:status",
    "launch logs": "launch:logs",
    "launch cancel": "launch:cancel",
    "launch check": "launch:check",
    "benchmark": "benchmark:benchmark",
    "doctor": "machine:doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 failed, 2 the user's mistake; others are in docs/operations.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments and "--" not in arguments[: arguments.index("--debug")]
    if debug:
        arguments.remove("--debug")
    rank = _failure_pipe()
    threading.excepthook = _in_thread
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no reason to fail
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line  # type: ignore[assignment]
            code = run_command(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        _say(f"mmlg: interrupted. To resume: {shlex.join(['mmlg', *arguments])}")
        return 130
    except RunStopped as stopped:
        return _tell_stopped(stopped, rank, arguments)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            _drop_output()
            return 128 + signal.SIGPIPE  # as programs end whose reader (head, less) has gone
        if isinstance(error, OSError):
            _drop_output()
        return _fail(error, rank)


def _failure_pipe() -> int | None:
    """Where one of several ranks says why it fails."""
    if "MMLG_ERROR_FD" not in os.environ:
        return None
    from mmlg_launchers.supervise import failure_pipe

    return failure_pipe()


def _fail(error: Exception, rank: int | None) -> int:
    """Say why the command fails, on the console or, as one of several ranks, to their supervisor; returns the exit code."""
    line = str(error) if isinstance(error, UserError) else in_words(error)
    if rank is None:
        if line is None:
            raise error
        _say(f"mmlg: error: {line}")
        return 2
    from mmlg_launchers.supervise import report_failure

    if line is not None:
        report_failure(rank, line, kind="user")
        return 2
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    details = "".join(traceback.format_exception(error))
    report_failure(rank, told, kind="follows" if _follows(error) else "internal", details=details)
    return 1


def _tell_stopped(stopped: RunStopped, rank: int | None, arguments: Sequence[str]) -> int:
    """Say that a run has ended before its time, as it was asked to; returns the exit code."""
    line = f"{stopped} Command: {shlex.join(['mmlg', *arguments])}"
    if rank is not None:
        from mmlg_launchers.supervise import report_failure

        report_failure(rank, line, kind="stopped")
    elif stopped.speaks:
        _say(f"mmlg: {line}")
    return stopped.exit_code


def _follows(error: Exception) -> bool:
    """Whether a rank fails because another one did: by its own account, or because the connection to it is closed."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, FollowingError) or "DistError" in kinds or "gloo/" in str(error)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the log is on the disk that is full
        print(line, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Give up what standard output does not take (a full disk, a reader that has gone): Python would complain of it when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _has_no_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return bool(poll.poll(0))  # nothing was asked for but errors
    except (OSError, AttributeError):
        return False  # no file, or no such call


def _in_thread(arguments: threading.ExceptHookArgs) -> None:
    """What the machine refuses to a library's thread the library passes on to its caller: once is enough."""
    if arguments.exc_value is None or in_words(arguments.exc_value) is None:
        threading.__excepthook__(arguments)


def _one_line(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Our own warnings are for the user, as a line; those of libraries are for developers."""
    if category.__module__.startswith("mmlg_"):
        print(f"mmlg: warning: {message}", file=sys.stderr)


def run_command(arguments: list[str]) -> int:
    """One command, whose mistakes are raised. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
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

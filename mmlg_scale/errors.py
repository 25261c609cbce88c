"""Errors that a user can do something about, as one line: mistakes in what was given, and what the machine refuses."""

from __future__ import annotations

import errno
import os
import re


class UserError(Exception):
    """A mistake in what the user gave: one line saying what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def require_key(condition: bool, key: str, problem: str, remedy: str) -> None:
    """Raise UserError of the recipe's dotted `key` unless the condition holds."""
    if not condition:
        raise UserError(f"recipe key {key}: {problem}. {remedy}")


class SupersededError(UserError):
    """Another start has taken over the run of this process, which may publish nothing any more. Only the first rank notices."""


class FollowingError(RuntimeError):
    """A rank stops because another one failed, which has said why."""


EXIT_REQUEUE = 75
"""Exit code of a run that USR2 stopped: it is to be started again, with the same command (sysexits.h calls 75 a temporary failure)."""
EXIT_STOPPED = 76
"""Exit code of a run that the file STOP in its folder stopped: it is not to be started again before somebody does so."""

EXIT_HANG = 74
"""Exit code of a run that hung, and ended itself."""


class RunStopped(Exception):
    """A run was asked to end before its time and has done so, on every rank.

    Attributes:
        exit_code: the process's.
        speaks: whether this rank is the one to print the message.
    """

    def __init__(self, message: str, exit_code: int, *, speaks: bool) -> None:
        super().__init__(message)
        self.exit_code, self.speaks = exit_code, speaks


_AGAIN = "Free some space, then start the same command again."
_OTHER = "Give another path, or make this one accessible."
_MEMORY_REMEDY = "Use a smaller model or batch; in training also accumulation, runtime.activation_checkpointing or fewer workers."
_WORDS = {
    errno.ENOSPC: ("the disk is full", _AGAIN),
    errno.EDQUOT: ("your quota on this disk is used up", _AGAIN),
    errno.EFBIG: ("the file is larger than this file system or the limit on file sizes (ulimit -f) allows", "Raise the limit."),
    errno.EIO: ("reading or writing failed (input/output error)", "Check the disk, then start the same command again."),
    errno.ESTALE: ("the network file system no longer has this file (stale handle)", "Mount it again, then start the same command again."),
    errno.EROFS: ("this file system is read-only", "Give a path on another one."),
    errno.EACCES: ("permission denied", _OTHER),
    errno.EPERM: ("not permitted", _OTHER),
    errno.ENOENT: ("no such file or folder", "Check the path."),
    errno.EEXIST: ("exists already", "Give another path, or remove it."),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "Give another path."),
    errno.EISDIR: ("is a folder, where a file is expected", "Give another path."),
    errno.ENOTEMPTY: ("the folder is not empty", "Give another path, or empty it."),
    errno.ENAMETOOLONG: ("the name is too long", "Give a shorter one."),
    errno.ELOOP: ("symbolic links lead in a circle, or a link is where none may be", "Give another path."),
    errno.EMFILE: ("too many open files", "Raise the limit (ulimit -n 4096), or use fewer workers."),
    errno.ENFILE: ("too many open files on this machine", "Close other programs."),
    errno.ENOMEM: ("out of memory", _MEMORY_REMEDY),
    errno.ETXTBSY: ("the file is being executed", "Give another path."),
}


_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES, errno.EPERM)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says nothing about the file itself: too many open files, no permission, a failing disk."""
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def in_words(error: BaseException) -> str | None:
    """What the machine refused (file, disk, memory, encoding), where and what to do, in one line; None for errors of another kind.

    Libraries wrap what the system said in errors of their own; `files.writing` makes OSErrors with the path of those of writing.
    """
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        what = _one_line(str(error))
        return f"out of memory{f' ({what})' if what else ''}. {_MEMORY_REMEDY}"
    if isinstance(error, UnicodeEncodeError):
        return _unencodable(error)
    if not isinstance(error, OSError):
        return None
    if error.errno is None:
        return _one_line(str(error)) or type(error).__name__
    what, remedy = _WORDS.get(error.errno, (os.strerror(error.errno), "Start the same command again once that is settled."))
    if isinstance(error.filename, (str, bytes, os.PathLike)):
        return f"{os.fsdecode(error.filename)}: {what}. {remedy}"
    return f"{what}. {remedy}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says so: on a GPU by a type of its own, on the CPU by its words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "OutOfMemoryError" in kinds or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def failed_write(error: BaseException) -> int | None:
    """The system's error number in what a library raised while it wrote a file; 0: it failed, but the library does not say by what.

    None where it is no such error.
    """
    said = str(error)
    found = re.search(r"\(os error (\d+)\)", said)  # safetensors
    if found is not None:
        return int(found[1])
    # torch.save, whose stream of C++ drops the number; numpy, which writes through C.
    if re.search(r"inline_container\.cc|iostream error|PytorchStreamWriter|requested and \d+ written", said):
        return 0
    return None


def _unencodable(error: UnicodeEncodeError) -> str:
    bad = error.object[error.start]
    start = max(0, error.start - 20)
    around = ascii(error.object[start : error.end + 20])
    if "\ud800" <= bad <= "\udfff":
        return f"a name or text is not valid Unicode: {around}. Rename the file, if it is the name of one, or correct the text."
    return f"{around} cannot be encoded as {error.encoding}. Use a UTF-8 locale: export LANG=C.UTF-8 PYTHONUTF8=1."


def _one_line(text: str) -> str:
    return " ".join(text.split())

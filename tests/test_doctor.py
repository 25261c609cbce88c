"""`mmlg doctor` names what is not there and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from mmlg_scale import doctor, files
from mmlg_scale.cli import main
from mmlg_scale.errors import UserError


def finding(name: str) -> doctor.Finding:
    return next(found for found in doctor.examine() if found.name == name)


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(found) == set(doctor.CHECKS)
    assert torch.__version__ in found["torch"]["found"]
    assert found["CPU cores"]["found"] == f"{len(os.sched_getaffinity(0))} usable"
    assert "gloo" in found["communication"]["found"]
    assert all(entry["state"] == "ok" or entry["remedy"] for entry in found.values())
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "DeepSpeed" in said
    assert said.endswith("\nTraining works on this machine.\n")


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})


def test_too_little_disk_and_shared_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, "disk", "shared memory")
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: 2**29)
    assert finding("disk").state == "missing"
    assert finding("disk").found.startswith("0.5 GiB")
    assert "--shm-size" in finding("shared memory").remedy
    assert "runtime.num_workers" in finding("shared memory").remedy
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\nMissing: disk. See the table above.\n")


def test_a_cgroup_limits_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, "memory")
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    monkeypatch.setattr(doctor, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / "memory.max"))
    assert finding("memory").found.startswith("3 GiB")


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "Triton", "DeepSpeed")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert finding("Triton").state == "absent"
    assert finding("DeepSpeed").state == "missing"
    assert "make setup" in finding("DeepSpeed").remedy


def test_no_gpu_and_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "CUDA", "Triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finding("CUDA").state == "absent"
    assert "CPU" in finding("CUDA").remedy
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in finding("Triton").remedy


@pytest.mark.parametrize(
    ("script", "state", "said"),
    [
        ('echo "debug up 2"', "ok", "partitions: debug up 2"),
        ('echo "slurm_load_partitions: Unable to contact slurm controller" >&2; exit 1', "absent", "Unable to contact slurm controller"),
        ("exec sleep 60", "absent", "no answer in 1 s"),
    ],
)
def test_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, state: str, said: str) -> None:
    only(monkeypatch, "Slurm")
    monkeypatch.setattr(doctor, "SLURM_SECONDS", 1)
    for name in ("sbatch", "squeue", "srun", "scancel", "sinfo"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert finding("Slurm").state == state
    assert said in finding("Slurm").found
    (tmp_path / "srun").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "srun" in finding("Slurm").found


def test_too_little_space_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda folder: 2**30)
    files.require_space(tmp_path, 2**30, "a checkpoint")
    with pytest.raises(UserError, match=r"a checkpoint needs 2\.00 GiB, 1\.00 GiB are free"):
        files.require_space(tmp_path / "runs" / "new", 2**31, "a checkpoint")
    assert list(tmp_path.iterdir()) == []

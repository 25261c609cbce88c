"""Tests on a GPU, which need no more than torch, triton and pytest: the conftest above them is not read by `make gpu-check`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """After an illegal access every call of the process fails: the worker ends, pytest-xdist names the test and starts a new one.

    Without it the worker would fail all tests that are left, and quickly, so that most of them would be given to it.
    """
    report = yield
    if call.excinfo is not None and torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return report

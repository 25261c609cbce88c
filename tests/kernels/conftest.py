"""Triton kernels run in Triton's interpreter here; the variable must stand before they are imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

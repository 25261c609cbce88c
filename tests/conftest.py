"""Before any test module is imported: where there is no GPU, Triton's kernels run in Triton's interpreter.

Triton reads the variable when it is first imported, which the module of an unrelated test may do.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

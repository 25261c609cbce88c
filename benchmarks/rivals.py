"""Published fused contrastive losses, as losses of (x, y, scale[, bias]) on unit rows. Those that are installed; they run only on GPUs.

    pip install memeff inf-cl siglip-kernel        # pure Python over Triton: wheels can be carried to a machine without a network

What each computes was compared with the plain definition in Triton's interpreter (only Inf-CL's forward pass, since its backward pass
holds inline assembly); its speed is measured where there is a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

Loss = Callable[..., Tensor]


def installed(kind: str, scale: float) -> dict[str, Loss]:
    """Rivals of a kind of loss (softmax, sigmoid) by name; `scale` is that of the inputs, which memeff takes as a plain number."""
    makers: dict[str, Callable[[], Loss]] = (
        {"memeff": lambda: _memeff(scale), "Inf-CL": _inf_cl} if kind == "softmax" else {"siglip-kernel": _siglip_kernel}
    )
    found = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError:
            print(f"{name} is not installed: left out")
    return found


def _memeff(scale: float) -> Loss:
    """Both directions. It gives the scale no gradient: its error against fp64 shows as one, and nothing is computed for it."""
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
    return lambda x, y, s: loss(x, y) + 0.0 * s


def _inf_cl() -> Loss:
    """One direction per call, as in its authors' trainer; the features go through fp32."""
    directed = importlib.import_module("inf_cl").cal_flash_loss
    return lambda x, y, s: (directed(x, y, scale=s).mean() + directed(y, x, scale=s).mean()) / 2


def _siglip_kernel() -> Loss:
    """The kernel that it chooses for the GPU; it takes the logarithm of the scale."""
    loss = importlib.import_module("siglip_kernel").fused_siglip_loss
    return lambda x, y, s, b: loss(x, y, s.log(), b)

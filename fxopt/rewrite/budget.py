"""What checking one distinct rewrite by numbers may cost, on each kind of device. Level "strict" knows no budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: for all runs of one comparison, as they are estimated
SECONDS = 0.3


@dataclass(frozen=True)
class Budget:
    """`bytes` of memory beyond the model's, and what is believed of the device in float64."""

    bytes: int
    seconds_an_element: float
    seconds_a_flop: float


def budget_of(device: torch.device) -> Budget:
    """The budget of a comparison on `device`: on a GPU a quarter of the memory that is free."""
    if device.type != "cuda":
        return Budget(64 << 20, 1e-8, 5e-10)
    free, _ = torch.cuda.mem_get_info(device)
    # A100, H100 and B200 have float64 units for 10 TFLOP/s and more; other GPUs a 64th of what they do in float32.
    scientific = torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))
    return Budget(free // 4, 5e-11, 1e-13 if scientific else 2e-12)

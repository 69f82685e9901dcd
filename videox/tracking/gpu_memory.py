"""Peak memory of a GPU in a run, beside the peak that was predicted for it."""

from __future__ import annotations

import torch

GIB = 2**30


class GpuMemory:
    """Reads torch's counters of a GPU's memory, which the host keeps: nothing waits for the device.

    Args:
        device: the GPU.
        predicted: bytes of tensors at the peak, as --dry_run estimates them.
    """

    def __init__(self, device: torch.device, predicted: float) -> None:
        self.device, self.predicted = device, predicted

    def measure(self) -> dict[str, float]:
        """Return GiB since the process began: of tensors, of the allocator's segments, and the predicted tensors."""
        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
            "predicted_gib": self.predicted / GIB,
        }

    def line(self) -> str:
        """Return the same in words, with the error of the prediction."""
        allocated, reserved, predicted = self.measure().values()
        error = f" ({predicted / allocated - 1:+.0%})" if allocated else ""
        return f"GPU memory so far: peak {allocated:.1f} GiB allocated, {reserved:.1f} GiB reserved; predicted {predicted:.1f} GiB{error}"

"""Peak memory of a piece of work, measured from the operating system or from CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures how far a block of code raises the memory of this process above where it began.

    On CUDA this is the peak of memory allocated to tensors. On the CPU it is the peak resident set
    size, which counts everything: tensors, workspaces of the linear algebra library, temporaries.
    The kernel's high-water mark is reset on entry, so that earlier work does not count; that needs
    Linux. Elsewhere nothing is measured.

    Attributes:
        bytes: Peak above the level on entry, set on exit; None where it cannot be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        self._device = device
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            _return_freed_memory()
            self._start = _reset_high_water_mark()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._start is None:
            return
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _peak_bytes()
        self.bytes = None if peak is None else max(0, peak - self._start)


def _return_freed_memory() -> None:
    """Make the C library give back what is freed, so that a peak starts from what is in use."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_high_water_mark() -> int | None:
    """Reset the peak resident set size to the present one and return it in bytes."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _peak_bytes()


def _peak_bytes() -> int | None:
    with contextlib.suppress(OSError):
        lines = _STATUS.read_text().splitlines()
        return next((1024 * int(one.split()[1]) for one in lines if one.startswith("VmHWM:")), None)
    return None

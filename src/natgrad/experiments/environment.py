"""Versions and machine, for the record."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch

from natgrad.version import __version__


def describe_environment(device: torch.device) -> dict[str, object]:
    """Return versions, processor or GPU, cores and threads as JSON values."""
    return {
        "natgrad": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

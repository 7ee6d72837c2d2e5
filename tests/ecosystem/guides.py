"""Code blocks of the documentation, run in processes of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import processes

DOCS = Path(__file__).parents[2] / "docs"


def block_with(page: str, text: str) -> str:
    """Return the one code block of a page that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    (found,) = (block for block in blocks if text in block)
    return found


def call_apart(function: Callable[[Path], Any], folder: Path) -> Any:
    """Return what a function of a folder returns in a process of its own.

    Other packages change PyTorch's defaults; no group of processes, which they would take part in.
    """
    process = processes.start(_save_result, function, folder)
    assert processes.finish(process) == 0
    return torch.load(folder / "result.pt", weights_only=False)


def _save_result(function: Callable[[Path], Any], folder: Path) -> None:
    torch.save(function(folder), folder / "result.pt")

"""The reference pages of the documentation name everything public, once."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import natgrad
from natgrad import curvature, likelihoods, ntk, solvers, tools, wave_functions

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"

NAMES = re.findall(
    r"^\.\. auto(?:class|function):: (\S+)$",
    "\n".join(page.read_text() for page in sorted(REFERENCE.glob("*.md"))),
    re.M,
)


def documented() -> Counter[int]:
    found: Counter[int] = Counter()
    for path in NAMES:
        module, _, name = path.rpartition(".")
        found[id(getattr(importlib.import_module(module), name))] += 1
    return found


def test_everything_public_is_in_the_reference_once():
    found = documented()
    assert set(found.values()) == {1}
    missing = [
        f"{module.__name__}.{name}"
        for module in (natgrad, curvature, likelihoods, ntk, solvers, tools, wave_functions)
        for name in module.__all__
        if callable(getattr(module, name)) and id(getattr(module, name)) not in found
    ]
    assert missing == []


def test_every_page_is_in_the_table_of_contents():
    docs = REFERENCE.parent
    index = (docs / "index.md").read_text()
    listed = {line for block in re.findall(r"```{toctree}(.*?)```", index, re.S)
              for line in block.split("\n") if line and not line.startswith(":")}  # fmt: skip
    pages = {str(page.relative_to(docs).with_suffix("")) for page in docs.rglob("*.md")}
    assert pages - {"index"} == listed - {"auto_gallery/index"}  # Which is made of the gallery.

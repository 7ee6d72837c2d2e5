"""The guide's code and the example run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.scripts import load_module

ROOT = Path(__file__).parents[2]


def test_the_guide_runs():
    text = (ROOT / "docs" / "wave_functions.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 4
    # The true energy of 8 sites after 20 steps, from 1,024 samples each.
    assert abs(names["energy"] / -10.251661790966 - 1) < 1e-2
    assert names["found"].r_hat < 1.2


def test_the_example_runs(capsys):
    module = load_module(ROOT / "examples" / "wave_function.py")
    module.main(["--fast"])
    lines = capsys.readouterr().out.splitlines()
    assert "exact energy -10.25166179" in lines
    errors = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(errors) == 5 and errors[-1] < 1e-2 < errors[0]
    module.main(["--fast", "--hamiltonian", "heisenberg", "--exact"])
    errors = [
        float(line.split()[-1])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("step")
    ]
    assert errors[-1] < 1e-3

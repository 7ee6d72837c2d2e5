"""What `import natgrad` loads: nothing before it is asked for, and nothing from the network."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import natgrad
from tests.test_no_network import FORBID

#: Prints which modules an import adds, which an optimizer's name, and which of the compiler's
#: are there after training.
PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import natgrad
print(json.dumps(sorted(set(sys.modules) - before)))
natgrad.KFAC
print(json.dumps(sorted(set(sys.modules) - before)))

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
groups = [{"modules": [model[0]], "preconditioned": False}]
for name in ("adamw", "sgd"):
    optimizer = natgrad.KFAC(model, params=groups, fallback=name)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).logsumexp(1).sum().backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
print(json.dumps(sorted({"torch._dynamo", "sympy"} & set(sys.modules))))
natgrad.Laplace(model, [(torch.randn(5, 3), torch.arange(5) % 2)], "categorical")
"""


@pytest.fixture(scope="module")
def printed():
    command = [sys.executable, "-W", "ignore", "-c", FORBID + PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def loaded(printed):
    return printed[1]


def test_the_import_itself_loads_nothing(printed):
    assert [name for name in printed[0] if "natgrad" in name] == ["natgrad", "natgrad.version"]


@pytest.mark.parametrize("name", ["experiments", "laplace", "ntk", "quality", "residuals", "tools"])
def test_what_training_does_not_need_is_not_loaded(loaded, name):
    assert "natgrad.optim" in loaded
    assert not [module for module in loaded if module.startswith(f"natgrad.{name}")]


def test_no_other_package_is_loaded(loaded):
    known = {"natgrad", *sys.stdlib_module_names}
    assert not {module.split(".")[0] for module in loaded} - known


def test_training_does_not_load_the_compiler(printed):
    assert printed[2] == []


def test_every_public_name_is_there():
    assert set(natgrad.__all__) <= set(dir(natgrad))
    for name in natgrad.__all__:
        assert getattr(natgrad, name) is not None
    assert natgrad.residuals.Residual is natgrad.Residual
    assert natgrad.linalg.__name__ == "natgrad.linalg"


def test_names_are_loaded_from_where_type_checkers_look_for_them():
    """What is imported for type checkers alone is what the table has, and all of it is public."""
    tree = ast.parse(Path(natgrad.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (f"{line.module}.{alias.name}" if line.module == "natgrad" else line.module, alias.name)
        for line in block.body
        for alias in line.names
    }
    names = {name for _, name in typed}
    assert names == set(natgrad.__all__) - {"__version__"}
    for module, name in typed:
        value = getattr(natgrad, name)
        home = importlib.import_module(module)
        assert value is (home if inspect.ismodule(value) else getattr(home, name))


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="KFACC"):
        natgrad.KFACC  # noqa: B018

"""What `import natgrad` loads: no more than training needs, and nothing from the network."""

import json
import subprocess
import sys

import pytest

import natgrad
from tests.test_no_network import FORBID

#: Prints which modules an import adds, and which of the compiler's are there after training.
PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
import natgrad
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
    return printed[0]


@pytest.mark.parametrize("name", ["experiments", "laplace", "ntk", "quality", "residuals", "tools"])
def test_what_training_does_not_need_is_not_loaded(loaded, name):
    assert "natgrad.optim" in loaded
    assert not [module for module in loaded if module.startswith(f"natgrad.{name}")]


def test_no_other_package_is_loaded(loaded):
    known = {"natgrad", *sys.stdlib_module_names}
    assert not {module.split(".")[0] for module in loaded} - known


def test_training_does_not_load_the_compiler(printed):
    assert printed[1] == []


def test_every_public_name_is_there():
    assert set(natgrad.__all__) <= set(dir(natgrad))
    for name in natgrad.__all__:
        assert getattr(natgrad, name) is not None
    assert natgrad.residuals.Residual is natgrad.Residual


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="KFACC"):
        natgrad.KFACC  # noqa: B018

"""Laplace posteriors beside those of laplace-torch: do they agree, and what do they cost?

    pip install laplace-torch
    python benchmarks/posteriors.py                # the numbers of both, of one model and data
    python benchmarks/posteriors.py --cost resnet  # or mlp, vit: each posterior in its own process

Costs are processor seconds of one thread and the rise of the resident set above where it was with
model and data loaded: of the fit, of the best prior precision, and of predictions for 100 inputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from networks import VisionTransformer, mlp, resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.memory import PeakMemory

LONGEST = 300  # Seconds that one posterior may take.
STRUCTURES = {"full": "full", "kfac": "kron", "diagonal": "diag"}
#: Network, shape of an input, samples, and samples of a batch.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "mlp": (lambda: mlp([784, 128, 64, 10], nn.Tanh), (784,), 2000, 100),
    "resnet": (lambda: resnet(10), (3, 32, 32), 200, 20),
    "vit": (lambda: VisionTransformer(32, 4, 10), (3, 32, 32), 200, 20),
}


def theirs(
    model: nn.Module, structure: str, likelihood: str = "classification", **options: Any
) -> Any:
    """Return a posterior of laplace-torch before its fit."""
    from laplace import Laplace

    parameters = "last_layer" if structure == "last layer" else "all"
    kind = STRUCTURES.get(structure, "full")
    return Laplace(
        model, likelihood, subset_of_weights=parameters, hessian_structure=kind, **options
    )


# -- Agreement -------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def agreement() -> None:
    """Print how far evidence, covariances and predictions of both differ, in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    x, new = torch.randn(60, 4), torch.randn(20, 4)
    targets = {"classification": torch.arange(60) % 3, "regression": torch.randn(60, 3)}
    settings: list[dict[str, Any]] = [
        {}, {"temperature": 0.5}, {"prior_mean": 0.1}, {"layers": (0.3, 4.0)}, {"sigma": 0.4},
    ]  # fmt: skip
    structures = [*STRUCTURES, "last layer"]
    for likelihood, structure, setting in itertools.product(targets, structures, settings):
        sigma, layers = setting.get("sigma", 1.0), setting.get("layers")
        if likelihood == "classification" and "sigma" in setting:
            continue
        if layers is not None and structure == "last layer":
            continue
        plain = {k: v for k, v in setting.items() if k in ("temperature", "prior_mean")}
        model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
        y, delta = targets[likelihood], 2.0
        loader = DataLoader(TensorDataset(x, y), batch_size=60)
        other = theirs(model, structure, likelihood, **plain)
        other.fit(loader)
        noise = {} if likelihood == "classification" else {"sigma_noise": torch.tensor(sigma)}
        precision = torch.tensor(delta if layers is None else layers)
        if layers is not None and structure != "kfac":
            precision = precision.repeat_interleave(torch.tensor([32, 24]))
        evidence = float(other.log_marginal_likelihood(precision, **noise))
        mean, covariance = other._glm_predictive_distribution(new)
        own = natgrad.Laplace(
            model, loader,
            "categorical" if likelihood == "classification" else natgrad.Gaussian(sigma**2),
            "full" if structure == "last layer" else structure,
            parameters="last_layer" if structure == "last layer" else "all",
            prior_precision=delta if layers is None else {"0": layers[0], "2": layers[1]},
            **plain,
        )  # fmt: skip
        found = own.log_marginal_likelihood()
        if likelihood == "regression":  # The constant, and the part that T does not divide there.
            size = y.numel()
            found -= size * torch.log(torch.tensor(2 * torch.pi)).item() / 2
            found += size * torch.log(torch.tensor(sigma)).item() * (1 / own.temperature - 1)
        own_mean, own_covariance = own.functional_variance(new)
        print(
            f"{likelihood:15} {structure:10} {setting!s:24}"
            f" evidence {abs(found / evidence - 1):.0e}"
            f" mean {relative(own_mean, mean):.0e} covariance"
            f" {relative(own_covariance, covariance):.0e}"
        )


# -- Cost ------------------------------------------------------------------------------------------


def cost(network: str, library: str, structure: str) -> dict[str, Any]:
    """Return what one posterior costs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, shape, samples, batch = NETWORKS[network]
    model, x, y = build().eval(), torch.randn(samples, *shape), torch.arange(samples) % 10
    loader, new = DataLoader(TensorDataset(x, y), batch_size=batch), torch.randn(100, *shape)
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    posterior: Any = None

    def fit() -> None:
        nonlocal posterior
        if library == "natgrad":
            last = structure == "last layer"
            # The transformer's table of positions is one parameter of 4,096.
            options = {"max_factor_size": 1024} if structure == "kfac" else {}
            posterior = natgrad.Laplace(
                model, loader, "categorical", "full" if last else structure,
                parameters="last_layer" if last else "all", **options,
            )  # fmt: skip
        else:
            posterior = theirs(model, structure)
            posterior.fit(loader)

    def choose() -> None:
        if library == "natgrad":
            posterior.optimize_prior_precision()
        else:
            posterior.optimize_prior_precision(method="marglik")

    def predict() -> None:
        with torch.no_grad():
            found = posterior.predict(new) if library == "natgrad" else posterior(new)
        assert found.shape == (100, 10)

    for name, work in (("fit", fit), ("prior", choose), ("predict", predict)):
        with PeakMemory(torch.device("cpu")) as memory:
            start = time.process_time()
            work()
            result[name] = time.process_time() - start
        result[f"{name}_mib"] = None if memory.bytes is None else memory.bytes / 2**20
    return result


def costs(network: str) -> None:
    """Print a line for every posterior, each made in a process of its own."""
    for structure, library in itertools.product(
        ("kfac", "diagonal", "last layer"), ("natgrad", "laplace-torch")
    ):
        command = [sys.executable, __file__, "--cost", network, "--one", library, structure]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            print(f"{structure:10} {library:14} not done after {LONGEST} s", flush=True)
            continue
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            print(f"{structure:10} {library:14} failed: {reason}", flush=True)
            continue
        one = json.loads(done.stdout.splitlines()[-1])
        parts = "  ".join(
            f"{name} {one[name]:7.2f} s {one[f'{name}_mib'] or 0:6.0f} MiB"
            for name in ("fit", "prior", "predict")
        )
        print(f"{structure:10} {library:14} {one['parameters']:8,} parameters  {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cost", choices=NETWORKS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost is None:
        agreement()
    elif arguments.one is None:
        costs(arguments.cost)
    else:
        print(json.dumps(cost(arguments.cost, *arguments.one)))


if __name__ == "__main__":
    main()

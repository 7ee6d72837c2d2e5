"""The Gram matrix of a network's Jacobian: factored rows against a materialised Jacobian.

python benchmarks/gram.py                     # MLP 784-1024-1024-10, N=100, C=10
python benchmarks/gram.py --no-dense          # skip the materialised Jacobian (30 s, 7.5 GB)
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import natgrad


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def factored(model: nn.Module, inputs: Tensor) -> Tensor:
    with natgrad.Capture(model) as capture:
        output = model(inputs)
        outputs = output.shape[1]
        vectors = torch.eye(outputs).unsqueeze(1).expand(outputs, *output.shape)
        return capture.pull_back(output, vectors, retain_graph=False).gram()


def materialised(model: nn.Module, inputs: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(model, p, (inputs,)))(parameters)
    rows = inputs.shape[0] * 10
    total = torch.zeros(rows, rows)
    for part in jacobian.values():
        flat = part.reshape(rows, -1)
        total.addmm_(flat, flat.T)
    return total


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(route: str, samples: int, repeats: int) -> None:
    model = make_model()
    inputs = torch.randn(samples, 784, generator=torch.Generator().manual_seed(0))
    function = factored if route == "factored" else materialised
    if route == "factored":
        factored(model, inputs[:10])  # Warm up threads and the allocator.
    before = peak()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        gram = function(model, inputs)
        seconds.append(time.perf_counter() - start)
    print(json.dumps([statistics.median(seconds), peak() - before, float(gram.norm())]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--one", choices=("factored", "materialised"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        repeats = 7 if arguments.one == "factored" else 1
        run(arguments.one, arguments.samples, repeats)
        return
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {platform.machine()}; MLP 784-1024-1024-10, "
        f"N={arguments.samples}, C=10"
    )
    print(f"{'route':<14} {'seconds':>9} {'extra MiB':>10} {'|Gram|':>12}")
    results = {}
    for route in ("factored",) if arguments.no_dense else ("factored", "materialised"):
        command = [sys.executable, __file__, "--one", route, "--samples", str(arguments.samples)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        results[route] = json.loads(found.stdout.splitlines()[-1])
        seconds, extra, norm = results[route]
        print(f"{route:<14} {seconds:9.3f} {extra:10.0f} {norm:12.6g}")
    if len(results) == 2:
        print(f"ratio {results['materialised'][0] / results['factored'][0]:.0f}x")


if __name__ == "__main__":
    main()

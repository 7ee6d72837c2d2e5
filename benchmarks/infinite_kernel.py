"""Time and memory of infinite-width kernels, one process per activation.

python benchmarks/infinite_kernel.py                  # N=2000, depth 3
python benchmarks/infinite_kernel.py --samples 500
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

from natgrad.ntk.infinite import infinite_kernel
from natgrad.ntk.networks import MLP

ACTIVATIONS = ("relu", "erf", "gelu", "tanh")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(activation: str, samples: int, depth: int) -> None:
    model = MLP((100, *[1] * (depth - 1), 1), activation, 2.0, 0.1)
    inputs = torch.randn(samples, 100, generator=torch.Generator().manual_seed(0))
    infinite_kernel(model, inputs[:10])  # Warm up threads and the allocator.
    before = peak()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        kernel = infinite_kernel(model, inputs)
        seconds.append(time.perf_counter() - start)
        error = kernel.error
        del kernel
    print(json.dumps([statistics.median(seconds), peak() - before, error]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--one", choices=ACTIVATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run(arguments.one, arguments.samples, arguments.depth)
        return
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {platform.machine()}; N={arguments.samples}, "
        f"depth {arguments.depth}, float64"
    )
    print(f"{'activation':<12} {'seconds':>9} {'extra MiB':>10} {'stated error':>14}")
    for activation in ACTIVATIONS:
        command = [sys.executable, __file__, "--one", activation]
        command += ["--samples", str(arguments.samples), "--depth", str(arguments.depth)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, extra, error = json.loads(found.stdout.splitlines()[-1])
        print(f"{activation:<12} {seconds:9.3f} {extra:10.0f} {error:14.1e}")


if __name__ == "__main__":
    main()

"""Time and memory of tangent kernels, one process per case.

python benchmarks/kernels.py                # both below
python benchmarks/kernels.py infinite       # infinite width, N=2000, depth 3
python benchmarks/kernels.py empirical      # width 2048, depth 3, N=1000, C=10: 10,000 x 10,000
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

from natgrad import ntk

INFINITE = ("relu", "erf", "gelu", "tanh")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def infinite(activation: str, samples: int) -> tuple[list[float], float]:
    model = ntk.MLP((100, 1, 1, 1), activation, 2.0, 0.1)
    inputs = torch.randn(samples, 100, generator=torch.Generator().manual_seed(0))
    ntk.infinite_kernel(model, inputs[:10])  # Warm up threads and the allocator.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        kernel = ntk.infinite_kernel(model, inputs)
        seconds.append(time.perf_counter() - start)
        error = kernel.error
        del kernel
    return seconds, error


def empirical(outputs: str, samples: int) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = ntk.MLP((784, 2048, 2048, 10))
    inputs = torch.randn(samples, 784)
    ntk.empirical_kernel(model, inputs[:10])
    start = time.perf_counter()
    kernel = ntk.empirical_kernel(model, inputs, outputs=outputs)
    return [time.perf_counter() - start], float((kernel - kernel.mT).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="?", choices=("infinite", "empirical"))
    parser.add_argument("--samples", type=int, help="N [default: 2000 infinite, 1000 empirical]")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure = infinite if arguments.kind == "infinite" else empirical
        seconds, error = measure(arguments.one, arguments.samples)
        print(json.dumps([statistics.median(seconds), peak(), error]))
        return
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
    cases = [("infinite", name, 2000) for name in INFINITE]
    cases += [("empirical", name, 1000) for name in ("full", "trace")]
    print(f"{'kernel':<10} {'case':<8} {'N':>6} {'seconds':>9} {'peak MiB':>9} {'error':>9}")
    for kind, case, samples in cases:
        if arguments.kind not in (None, kind):
            continue
        samples = arguments.samples or samples
        command = [sys.executable, __file__, kind, "--one", case, "--samples", str(samples)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, memory, error = json.loads(found.stdout.splitlines()[-1])
        print(f"{kind:<10} {case:<8} {samples:>6} {seconds:9.2f} {memory:9.0f} {error:9.1e}")


if __name__ == "__main__":
    main()

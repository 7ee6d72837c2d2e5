"""Time per training step as a ratio to SGD with momentum, and peak memory.

All methods train the same network in one process, taking turns of one whole refresh cycle, so that
the machine's drift hits all of them alike; the ratio is taken turn by turn and its median is
printed. Peers are timed where they are installed (``pip install asdfghjkl singd``).

    python benchmarks/step_time.py                      # MLP 784-1024-1024-10, batch 256
    python benchmarks/step_time.py --model cnn --batch-size 64 --methods sgd,adamw,kfac
    python benchmarks/step_time.py --memory             # peak memory, one process per method
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
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad

Step = Callable[[Tensor, Tensor], None]


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        sizes = (784, 1024, 1024, 10)
        layers: list[nn.Module] = []
        for d_in, d_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 64, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
    raise ValueError(f"model must be mlp or cnn, got {name!r}")


def make_batch(name: str, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (size, 784) if name == "mlp" else (size, 3, 32, 32)
    inputs = torch.randn(shape, generator=generator)
    return inputs, torch.randint(0, 10, (size,), generator=generator)


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def asdl(model: nn.Module, batch: int, factor: int, inverse: int) -> Step:
    import asdl

    if not torch.cuda.is_available():
        # It labels every operation for a GPU profiler, which a CPU build of PyTorch lacks.
        torch.cuda.nvtx.range = lambda *_: nullcontext()
    config = asdl.PreconditioningConfig(
        data_size=batch,
        damping=1e-2,
        ema_decay=0.05,
        curvature_upd_interval=factor,
        preconditioner_upd_interval=inverse,
    )
    maker = asdl.KfacGradientMaker(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        output = maker.setup_model_call(model, inputs)
        maker.setup_loss_call(functional.cross_entropy, output, targets)
        maker.forward_and_backward()
        optimizer.step()

    return step


def singd(model: nn.Module, factor: int) -> Step:
    from singd.optim.optimizer import SINGD

    return plain(model, SINGD(model, T=factor, lr=1e-4, loss_average="batch"))


def make_step(name: str, model_name: str, batch: int, factor: int, inverse: int) -> Step:
    model = make_model(model_name)
    parameters = model.parameters()
    if name == "sgd":
        return plain(model, torch.optim.SGD(parameters, lr=1e-4, momentum=0.9))
    if name == "adamw":
        return plain(model, torch.optim.AdamW(parameters, lr=1e-4))
    if name == "kfac":
        intervals = {"factor_interval": factor, "inverse_interval": inverse}
        return plain(model, natgrad.KFAC(model, lr=1e-4, momentum=0.9, **intervals))
    if name == "asdl":
        return asdl(model, batch, factor, inverse)
    if name == "singd":
        return singd(model, factor)
    raise ValueError(f"unknown method {name!r}")


def available(names: list[str]) -> list[str]:
    modules = {"asdl": "asdl", "singd": "singd"}
    kept = []
    for name in names:
        if name in modules and find_spec(modules[name]) is None:
            print(f"# {name} is not installed, left out", file=sys.stderr)
        else:
            kept.append(name)
    return kept


def measure(arguments: argparse.Namespace) -> None:
    names = available(arguments.methods.split(","))
    batch = make_batch(arguments.model, arguments.batch_size)
    cycle = max(arguments.factor_interval, arguments.inverse_interval)
    steps = {}
    for name in names:
        steps[name] = make_step(
            name,
            arguments.model,
            arguments.batch_size,
            arguments.factor_interval,
            arguments.inverse_interval,
        )
        for _ in range(3):
            steps[name](*batch)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.turns):
        for name in names:
            start = time.perf_counter()
            for _ in range(cycle):
                steps[name](*batch)
            seconds[name].append((time.perf_counter() - start) / cycle)
    print(f"{'method':<10} {'ms/step':>9} {'ratio to sgd':>13} {'min':>6} {'max':>6}")
    for name in names:
        ratios = [s / b for s, b in zip(seconds[name], seconds["sgd"], strict=True)]
        print(
            f"{name:<10} {1e3 * statistics.median(seconds[name]):9.2f} "
            f"{statistics.median(ratios):13.2f} {min(ratios):6.2f} {max(ratios):6.2f}"
        )


def measure_memory(arguments: argparse.Namespace) -> None:
    names = available(arguments.methods.split(","))
    print(f"{'method':<10} {'peak MiB':>9} {'above import MiB':>17}")
    for name in names:
        command = [sys.executable, __file__, "--one", name, "--model", arguments.model]
        command += ["--batch-size", str(arguments.batch_size)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = json.loads(found.stdout.splitlines()[-1])
        print(f"{name:<10} {peak:9.0f} {peak - before:17.0f}")


def one_for_memory(arguments: argparse.Namespace) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = make_step(arguments.one, arguments.model, arguments.batch_size, 2, 4)
    batch = make_batch(arguments.model, arguments.batch_size)
    for _ in range(6):
        step(*batch)
    print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--factor-interval", type=int, default=10)
    parser.add_argument("--inverse-interval", type=int, default=100)
    parser.add_argument("--methods", default="sgd,adamw,kfac,asdl,singd")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.one:
        one_for_memory(arguments)
        return
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {platform.machine()}; {arguments.model}, batch "
        f"{arguments.batch_size}, factors every {arguments.factor_interval}, inverses every "
        f"{arguments.inverse_interval} steps"
    )
    if arguments.memory:
        measure_memory(arguments)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

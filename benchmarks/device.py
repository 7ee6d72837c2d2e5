"""Everything worth knowing of natgrad on one accelerator, in one command and one JSON file.

* agreement: the natural gradient of every structure, and the parameters after three steps of every
  optimizer, in float64 and float32 on the device, against float64 on the CPU; and a checkpoint of
  the device against the run it was taken from;
* training: K-FAC and SINGD lower the loss of a fixed batch, in float32 and with low precision;
* synchronisations: how often a step makes the host wait for the device;
* steps: time per step as a ratio to SGD with momentum, and the peak of memory while the optimizer
  is made and takes its first steps, model and batch included.

It takes CUDA where there is one and the CPU, with smaller networks, where there is none. A check
that raises is recorded as an error and the others still run; once ``--budget`` seconds have passed
the rest is recorded as skipped. The exit status is 1 if something does not agree or train.

    python benchmarks/device.py                                   # a few minutes, device.json
    python benchmarks/device.py --parts agreement,training        # some of it
    python benchmarks/device.py --device cpu --out cpu.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from approximation_error import make_model as make_small_model
from step_time import BATCH_SIZES, make_batch, make_step, synchronize, take_turns
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature import (
    STRUCTURES,
    Full,
    InverseFactors,
    KroneckerFactors,
    KroneckerProducts,
    Structure,
    TwoLevelKronecker,
    as_structure,
)
from natgrad.experiments.environment import describe_environment
from natgrad.experiments.memory import PeakMemory
from natgrad.solvers import ConjugateGradient, Thermodynamic

PARTS = ("agreement", "training", "synchronisations", "steps")

#: Largest relative error, in the Euclidean norm, that counts as agreement.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}

#: The same where more is not to be expected: the thermodynamic process takes its time step from a
#: random vector, which devices do not share, and the block-tridiagonal matrix is indefinite.
LOOSER = {
    "full, thermodynamic": {torch.float64: 0.2, torch.float32: 0.2},
    "steps of ThermodynamicNGD": {torch.float64: 0.2, torch.float32: 0.2},
    "kfac, bfloat16 products": {torch.float64: 5e-2, torch.float32: 5e-2},
    "block_tridiagonal": {torch.float64: 1e-6, torch.float32: 0.1},
    "steps of BlockTridiagonalNGD": {torch.float64: 1e-6, torch.float32: 0.1},
}

#: Variants of structures besides all registered ones at their defaults of training.
VARIANTS: dict[str, Structure] = {
    "kfac, exact damping": KroneckerFactors(factored_damping=False),
    "kfac, bfloat16 products": KroneckerFactors(product_dtype=torch.bfloat16),
    "kpsvd, rank 2": KroneckerProducts(rank=2),
    "kpsvd, deflation": KroneckerProducts(method="deflation", max_iterations=100),
    "singd, diagonal": InverseFactors("diagonal"),
    "singd, hierarchical": InverseFactors("hierarchical"),
    "two_level, nicolaides": TwoLevelKronecker(coarse_space="nicolaides"),
    "two_level, spectral": TwoLevelKronecker(coarse_space="spectral"),
    "two_level, residual": TwoLevelKronecker(coarse_space="residual"),
    "full, conjugate gradients": Full(solver=ConjugateGradient(1e-8, 500)),
    "full, thermodynamic": Full(solver=Thermodynamic()),
}

OPTIMIZERS: dict[str, type[natgrad.NaturalGradient]] = {
    kind.__name__: kind
    for kind in (
        natgrad.KFAC,
        natgrad.EKFAC,
        natgrad.TKFAC,
        natgrad.TEKFAC,
        natgrad.KPSVD,
        natgrad.TwoLevelKFAC,
        natgrad.SINGD,
        natgrad.ExactNGD,
        natgrad.BlockDiagonalNGD,
        natgrad.BlockTridiagonalNGD,
        natgrad.UnitWiseNGD,
        natgrad.DiagonalNGD,
        natgrad.ConjugateGradientNGD,
        natgrad.ThermodynamicNGD,
        natgrad.ImprovedEmpiricalNGD,
        natgrad.EGN,
        natgrad.FNGD,
    )
}

#: Methods of step_time.py; SGD, which the others are compared with, comes first.
METHODS = (
    "sgd", "adamw", "kfac", "kfac_fused", "kfac_bf16", "ekfac", "tkfac", "singd_ours",
    "singd_ours_diagonal", "fngd",
)  # fmt: skip

#: Steps between updates and between factorisations, the defaults of the optimizers.
FACTORS, INVERSES = 10, 20


@dataclass(frozen=True)
class Sizes:
    """How large the timed networks and batches are.

    Attributes:
        models: Networks of step_time.py.
        narrow: What their widths are divided by.
        batch: What their batch sizes are multiplied by.
        turns: Cycles of every method.
    """

    models: tuple[str, ...]
    narrow: int
    batch: float
    turns: int


SIZES = {
    "cuda": Sizes(("mlp", "cnn", "transformer", "resnet18"), narrow=1, batch=4, turns=3),
    "cpu": Sizes(("mlp", "cnn", "transformer"), narrow=8, batch=0.25, turns=2),
}


@dataclass
class Report:
    """What has been found so far, in memory and in the file."""

    path: Path
    deadline: float
    only: str = ""
    content: dict[str, Any] = field(default_factory=dict)

    def check(self, *keys: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do some work unless time is up; record what it returns or raises, and print it."""
        start = time.perf_counter()
        if self.only not in " / ".join(keys):
            return
        if start > self.deadline:
            found: dict[str, Any] = {"skipped": "out of time"}
        else:
            try:
                found = work()
            except Exception as error:
                where = traceback.format_exc().strip().splitlines()[-7:]
                found = {"error": f"{type(error).__name__}: {error}"[:2000], "where": where}
        found["seconds"] = round(time.perf_counter() - start, 3)
        place = self.content
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = found
        self.save()
        shown = ", ".join(f"{k} {_short(v)}" for k, v in found.items() if not _is_long(v))
        print(f"{' / '.join(keys):<48} {shown}", flush=True)

    def save(self) -> None:
        """Write the file."""
        text = json.dumps(_plain(self.content), indent=1, allow_nan=False)
        self.path.write_text(text + "\n", encoding="utf-8")

    def failed(self) -> list[str]:
        """Return the agreement and training checks that found a fault or raised."""
        return [
            f"{part} / {name}"
            for part in ("agreement", "training")
            for name, found in self.content.get(part, {}).items()
            if "error" in found or found.get("ok") is False
        ]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def _is_long(value: Any) -> bool:
    return isinstance(value, (dict, list))


def _plain(value: Any) -> Any:
    """Return the value with numbers that JSON does not know as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# Agreement.


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 products and convolutions from TF32."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def small_problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in float64 on the CPU after a few steps of Adam, and a batch."""
    model = make_small_model(name).double()
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 10, (24,), generator=generator)
    means = torch.randn(10, 1, 8, 8, generator=generator, dtype=torch.float64)
    inputs = means[labels] + torch.randn(24, 1, 8, 8, generator=generator, dtype=torch.float64)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        adam.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        adam.step()
    adam.zero_grad()
    return model, inputs, labels


def natural_gradient(
    structure: Structure, problem: tuple[nn.Module, Tensor, Tensor], device: Any, dtype: torch.dtype
) -> Tensor:
    """Return the natural gradient of the loss, as training makes it, on the host in float64."""
    model = copy.deepcopy(problem[0]).to(device, dtype)
    inputs, labels = problem[1].to(device, dtype), problem[2].to(device)
    preconditioner = natgrad.Preconditioner(
        model, structure=structure, fisher="exact", damping=1e-2
    )
    functional.cross_entropy(model(inputs), labels).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    preconditioner.step()
    after = [p.grad for p in model.parameters() if p.grad is not None]
    if all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
        raise AssertionError("the gradient was not preconditioned")
    return torch.cat([g.detach().double().cpu().flatten() for g in after])


def optimized(
    name: str, problem: tuple[nn.Module, Tensor, Tensor], device: Any, dtype: torch.dtype
) -> Tensor:
    """Return how three steps of an optimizer move the parameters, on the host in float64."""
    model = copy.deepcopy(problem[0]).to(device, dtype)
    inputs, labels = problem[1].to(device, dtype), problem[2].to(device)
    kind = OPTIMIZERS[name]
    options: dict[str, Any] = {}
    if kind is natgrad.FNGD:
        options = {"coefficient_steps": 2}
    elif kind is natgrad.ConjugateGradientNGD:  # Roundings must not decide when it stops.
        options = {"structure": VARIANTS["full, conjugate gradients"]}
    elif kind.method.fisher == "mc":  # Devices do not draw the same labels.
        options = {"fisher": "exact"}
    optimizer = kind(model, **options)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    before = _flat(model)
    for _ in range(3):
        optimizer.step(closure)
    return _flat(model) - before


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


def compared(
    title: str, function: Callable[..., Tensor], problems: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Return the relative errors of a vector on the device, by network and type."""
    tolerances = LOOSER.get(title, TOLERANCES)
    if device.type == "cpu":
        tolerances = {torch.float32: tolerances[torch.float32]}
    found: dict[str, Any] = {"ok": True}
    with full_precision():
        for name, problem in problems.items():
            exact = function(problem, "cpu", torch.float64)
            for dtype, tolerance in tolerances.items():
                error = function(problem, device, dtype) - exact
                relative = float(error.norm() / exact.norm())
                found[f"{name} {str(dtype).split('.')[-1]}"] = relative
                found["ok"] &= relative <= tolerance
    return found


def checkpoint(device: torch.device) -> dict[str, Any]:
    """Return whether a run that is resumed from a file goes on exactly as the first one."""
    start, inputs, labels = small_problem("mlp")
    batch = inputs.float().to(device), labels.to(device)
    errors: dict[str, Any] = {}
    for name in ("KFAC", "EKFAC", "SINGD"):
        kind = OPTIMIZERS[name]
        first = copy.deepcopy(start).to(device, torch.float32)
        optimizer = kind(first, refresh=replace(kind.method.refresh, factors=2, inverses=4))
        take_steps(first, optimizer, batch, 5)
        file = io.BytesIO()
        torch.save([first.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, map_location="cpu", weights_only=True)
        second = copy.deepcopy(start).to(device, torch.float32)
        second.load_state_dict(weights)
        resumed = kind(second, refresh=replace(kind.method.refresh, factors=2, inverses=4))
        resumed.load_state_dict(state)
        take_steps(first, optimizer, batch, 5)
        take_steps(second, resumed, batch, 5)
        errors[name] = float((_flat(second) - _flat(first)).norm() / _flat(first).norm())
    return {"ok": max(errors.values()) <= 1e-6, **errors}


def check_agreement(report: Report, device: torch.device) -> None:
    problems = {name: small_problem(name) for name in ("mlp", "cnn")}
    vectors: dict[str, Callable[..., Tensor]] = {}
    structures = {name: as_structure(name, training=True) for name in sorted(STRUCTURES)}
    for name, structure in {**structures, **VARIANTS}.items():
        vectors[name] = functools.partial(natural_gradient, structure)
    for name in OPTIMIZERS:
        vectors[f"steps of {name}"] = functools.partial(optimized, name)
    for title, function in vectors.items():
        work = functools.partial(compared, title, function, problems, device)
        report.check("agreement", title, work=work)
    report.check("agreement", "checkpoint", work=lambda: checkpoint(device))


# Training.


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    count: int,
    autocast: torch.dtype | None = None,
) -> list[float]:
    """Train and return the losses."""
    losses = []
    kind = batch[0].device.type
    scaler = torch.amp.GradScaler(kind, enabled=autocast == torch.float16)
    for _ in range(count):
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
            loss = functional.cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    return losses


def trained(
    kind: type[natgrad.NaturalGradient],
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return the loss of a fixed batch before and after 60 steps."""
    model, inputs, labels = small_problem("cnn")
    model = model.to(device, dtype)
    batch = inputs.to(device, dtype), labels.to(device)
    losses = take_steps(model, kind(model), batch, 60, autocast)
    ok = math.isfinite(losses[-1]) and losses[-1] < 0.5 * losses[0]
    return {"ok": ok, "first loss": losses[0], "last loss": losses[-1]}


def check_training(report: Report, device: torch.device) -> None:
    cases: dict[str, tuple[Any, torch.dtype, torch.dtype | None]] = {
        "KFAC, float32": (natgrad.KFAC, torch.float32, None),
        "KFAC, bfloat16 autocast": (natgrad.KFAC, torch.float32, torch.bfloat16),
        "EKFAC, bfloat16 autocast": (natgrad.EKFAC, torch.float32, torch.bfloat16),
        "SINGD, float32": (natgrad.SINGD, torch.float32, None),
        "SINGD, bfloat16": (natgrad.SINGD, torch.bfloat16, None),
    }
    if device.type == "cuda":
        cases["KFAC, float16 autocast"] = (natgrad.KFAC, torch.float32, torch.float16)
    for name, case in cases.items():
        report.check("training", name, work=functools.partial(trained, *case, device))


# Synchronisations.

#: Ways to look at the numbers in a tensor; on an accelerator each waits for it.
READERS = (
    "item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__",
)  # fmt: skip


@contextlib.contextmanager
def counted_reads() -> Iterator[Counter[str]]:
    """Count reads of tensors by the host, by the line that makes them."""
    counts: Counter[str] = Counter()

    def make(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(self: Tensor, *arguments: Any, **options: Any) -> Any:
            frame = sys._getframe(1)
            counts[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"] += 1
            return original(self, *arguments, **options)

        return read

    own = {name: vars(torch.Tensor)[name] for name in READERS if name in vars(torch.Tensor)}
    for name, function in {name: make(name) for name in READERS}.items():
        setattr(torch.Tensor, name, function)
    try:
        yield counts
    finally:
        for name in READERS:
            if name in own:
                setattr(torch.Tensor, name, own[name])
            else:
                delattr(torch.Tensor, name)


@contextlib.contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count synchronising CUDA operations, by the line that makes them."""
    counts: Counter[str] = Counter()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            counts[f"{Path(warning.filename).name}:{warning.lineno}"] += 1


def synchronisations(method: str, model: str, device: torch.device) -> dict[str, Any]:
    """Return the waits of one step: without an update, with one, and with a factorisation."""
    step = make_step(method, model, 8, FACTORS, INVERSES, device, narrow=8)
    inputs, targets = (tensor.to(device) for tensor in make_batch(model, 8))
    count = counted_waits if device.type == "cuda" else counted_reads
    moments = {INVERSES: "factorisation", INVERSES + FACTORS: "update", INVERSES + FACTORS + 1: ""}
    found: dict[str, Any] = {}
    for index in range(INVERSES + FACTORS + 2):
        if index not in moments:
            step(inputs, targets)
            continue
        with count() as counts:
            step(inputs, targets)
        found[moments[index] or "plain"] = sum(counts.values())
        found[f"where, {moments[index] or 'plain'}"] = dict(counts)
    found["counted"] = "CUDA warnings" if device.type == "cuda" else "reads of tensors"
    return found


def check_synchronisations(report: Report, device: torch.device) -> None:
    for model in ("mlp", "cnn"):
        for method in ("sgd", "kfac", "kfac_fused", "ekfac", "singd_ours"):
            report.check(
                "synchronisations", model, method,
                work=functools.partial(synchronisations, method, model, device),
            )  # fmt: skip


# Time and memory of steps.


def check_steps(report: Report, device: torch.device, sizes: Sizes) -> None:
    warm = make_step("sgd", "mlp", 8, FACTORS, INVERSES, device, narrow=8)
    warm(*(tensor.to(device) for tensor in make_batch("mlp", 8)))  # Libraries make workspaces.
    for model in sizes.models:
        check_steps_of(report, model, device, sizes)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def check_steps_of(report: Report, model: str, device: torch.device, sizes: Sizes) -> None:
    size = max(1, int(BATCH_SIZES[model] * sizes.batch))
    inputs, targets = (tensor.to(device) for tensor in make_batch(model, size))
    steps: dict[str, Callable[[Tensor, Tensor], None]] = {}

    def prepare(method: str) -> dict[str, Any]:
        with PeakMemory(device) as peak:
            step = make_step(method, model, size, FACTORS, INVERSES, device, sizes.narrow)
            for _ in range(INVERSES + 1):
                step(inputs, targets)
            synchronize(device)
        steps[method] = step
        return {"MiB": None if peak.bytes is None else peak.bytes / 2**20}

    report.check("steps", model, "batch", work=lambda: {"size": size})
    for method in METHODS:
        report.check("steps", model, "memory", method, work=functools.partial(prepare, method))
    report.check("steps", model, "time", work=lambda: timed(steps, (inputs, targets), sizes.turns))


def timed(
    steps: dict[str, Callable[[Tensor, Tensor], None]], batch: tuple[Tensor, Tensor], turns: int
) -> dict[str, Any]:
    """Return the mean step of a cycle with its ratio to SGD, and the median of single steps."""
    device = batch[0].device
    seconds = take_turns(steps, batch, INVERSES, turns)
    found: dict[str, Any] = {}
    for name, step in steps.items():
        singles = []
        for _ in range(INVERSES):
            synchronize(device)
            start = time.perf_counter()
            step(*batch)
            synchronize(device)
            singles.append(time.perf_counter() - start)
        ratios = [s / b for s, b in zip(seconds[name], seconds["sgd"], strict=True)]
        found[name] = {
            "ms": 1e3 * statistics.median(seconds[name]),
            "ratio to sgd": statistics.median(ratios),
            "least ratio": min(ratios),
            "largest ratio": max(ratios),
            "median single ms": 1e3 * statistics.median(singles),
            "largest single ms": 1e3 * max(singles),
        }
    base = found["sgd"]["median single ms"]
    for one in found.values():
        one["median single ratio"] = one["median single ms"] / base
    return found


def print_steps(report: Report) -> None:
    for model, found in report.content.get("steps", {}).items():
        print(f"\n{model}, batch {found.get('batch', {}).get('size')}")
        print(f"{'method':<20} {'ms/step':>9} {'ratio':>7} {'single':>7} {'peak MiB':>9}")
        for method, memory in found.get("memory", {}).items():
            one = found.get("time", {}).get(method)
            peak = "-" if memory.get("MiB") is None else f"{memory['MiB']:.1f}"
            columns = f"{'-':>9} {'-':>7} {'-':>7}"
            if isinstance(one, dict):
                columns = (
                    f"{one['ms']:9.2f} {one['ratio to sgd']:7.2f} {one['median single ratio']:7.2f}"
                )
            print(f"{method:<20} {columns} {peak:>9}")


def machine(device: torch.device) -> dict[str, Any]:
    """Return versions, the device and the settings of its products."""
    found: dict[str, Any] = dict(describe_environment(device))
    found["float32 products"] = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "device MiB": properties.total_memory / 2**20,
            "capability": f"{properties.major}.{properties.minor}",
            "TF32 convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("device.json"), help="[device.json]")
    parser.add_argument("--device", help="cuda, cuda:1, cpu ... [CUDA if there is one]")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--only", default="", help="checks whose name, as printed, holds this")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds to begin checks in")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    chosen = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(chosen)
    sizes = SIZES.get(device.type, SIZES["cpu"])
    start = time.perf_counter()
    report = Report(arguments.out, start + arguments.budget, arguments.only)
    report.check("machine", work=lambda: machine(device))
    if device.type == "cpu":
        print("# on the CPU, with smaller networks and batches than on a GPU")
    report.content["smaller sizes"] = sizes is SIZES["cpu"]
    runs: dict[str, Callable[[], None]] = {
        "agreement": lambda: check_agreement(report, device),
        "training": lambda: check_training(report, device),
        "synchronisations": lambda: check_synchronisations(report, device),
        "steps": lambda: check_steps(report, device, sizes),
    }
    for part in parts:
        try:
            runs[part]()
        except Exception as error:  # Beside the checks; these record their own.
            report.content.setdefault("errors", {})[part] = f"{type(error).__name__}: {error}"
            print(f"{part}: {error}")
    print_steps(report)
    failed = report.failed() + [
        part for part in ("agreement", "training") if part in report.content.get("errors", {})
    ]
    report.content["failed"] = failed
    report.content["seconds"] = round(time.perf_counter() - start, 1)
    report.save()
    print(f"\n# {report.content['seconds']:.0f} s; written to {arguments.out}")
    if failed:
        print("# failed: " + "; ".join(failed))
        sys.exit(1)


if __name__ == "__main__":
    main()

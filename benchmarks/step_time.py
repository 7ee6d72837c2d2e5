"""Time per training step as a ratio to SGD with momentum, and peak memory.

All methods train the same network in one process, taking turns of one whole refresh cycle, so that
the machine's drift hits all of them alike; the ratio is taken turn by turn and its median is
printed. Peers are timed where they are installed (``pip install asdfghjkl singd
curvlinops-for-pytorch nngeometry``) and can train the network.

    python benchmarks/step_time.py                      # MLP 784-1024-1024-10, batch 256
    python benchmarks/step_time.py --model cnn --batch-size 64 --methods sgd,adamw,kfac
    python benchmarks/step_time.py --model resnet --methods sgd,fngd,fngd_first_epoch
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
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature import InverseFactors, KroneckerFactors, Structure

Step = Callable[[Tensor, Tensor], None]

#: Other libraries, each named by its module.
PEERS = ("asdl", "singd", "curvlinops", "nngeometry")


@dataclass(frozen=True)
class Ours:
    """A way to run natgrad with curvature at intervals.

    Attributes:
        kind: Optimizer.
        structure: The method's own where None.
        stagger: Whether factorisations are spread over the steps between them.
    """

    kind: type[natgrad.NaturalGradient]
    structure: Structure | None = None
    stagger: bool = False

    def make(self, model: nn.Module, factor: int, inverse: int) -> natgrad.NaturalGradient:
        """Return the optimizer, at a rate that leaves the network about where it is."""
        if self.kind is natgrad.SINGD:
            inverse = factor  # Its factors take a step with every update, by products alone.
        method = self.kind.method
        return self.kind(
            model,
            lr=1e-4,
            momentum=0.9,
            structure=self.structure or method.structure,
            refresh=replace(method.refresh, factors=factor, inverses=inverse, stagger=self.stagger),
        )


BF16 = torch.bfloat16

OURS = {
    "kfac": Ours(natgrad.KFAC),
    "kfac_fused": Ours(natgrad.KFAC, KroneckerFactors(fused=True)),
    "kfac_bf16": Ours(natgrad.KFAC, KroneckerFactors(product_dtype=BF16)),
    "kfac_fused_bf16": Ours(natgrad.KFAC, KroneckerFactors(fused=True, product_dtype=BF16)),
    "kfac_staggered": Ours(natgrad.KFAC, stagger=True),
    "ekfac": Ours(natgrad.EKFAC),
    "tkfac": Ours(natgrad.TKFAC),
    "singd_ours": Ours(natgrad.SINGD),
    "singd_ours_diagonal": Ours(natgrad.SINGD, InverseFactors("diagonal")),
    "singd_ours_block": Ours(natgrad.SINGD, InverseFactors("block_diagonal")),
    "singd_ours_hierarchical": Ours(natgrad.SINGD, InverseFactors("hierarchical")),
}

#: Steps of FNGD that compute coefficients: one ("fngd" is timed after it), or all.
COEFFICIENT_STEPS = {"fngd": 1, "fngd_first_epoch": 10**9}


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, as in ResNet-18."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(d_out),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or d_in != d_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def resnet18(width: int, classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    d_in = width
    for stage in range(4):
        d_out = width * 2**stage
        for index in range(2):
            layers.append(ResidualBlock(d_in, d_out, 2 if stage and not index else 1))
            d_in = d_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d_in, classes))


class TransformerLayer(nn.Module):
    """Causal self-attention and a feed-forward network, normalised first."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.output = nn.Linear(size, size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.before_attention(x)
        q, k, v = (
            linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        return x + self.feed_forward(self.before_feed_forward(x))


class Transformer(nn.Module):
    """A decoder over characters."""

    def __init__(self, vocabulary: int, size: int, length: int, layers: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, size)
        self.places = nn.Embedding(length, size)
        self.layers = nn.Sequential(*(TransformerLayer(size, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.layers(self.characters(tokens) + self.places(places))))


def make_model(name: str, narrow: int = 1) -> nn.Module:
    """Return a network of its usual width, or of a fraction of it."""
    torch.manual_seed(0)
    if name == "mlp":
        sizes = (784, 1024 // narrow, 1024 // narrow, 10)
        layers: list[nn.Module] = []
        for d_in, d_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        return nn.Sequential(*layers[:-1])
    if name == "cnn":
        return nn.Sequential(
            nn.Conv2d(3, 32 // narrow, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32 // narrow, 64 // narrow, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 64 // narrow, 128 // narrow),
            nn.ReLU(),
            nn.Linear(128 // narrow, 10),
        )
    if name == "resnet":
        return resnet18(16 // narrow)
    if name == "resnet18":
        return resnet18(64 // narrow)
    return Transformer(65, 256 // narrow, 64, 4)


#: Batch sizes the models are timed with unless told otherwise.
BATCH_SIZES = {"mlp": 256, "cnn": 64, "resnet": 64, "resnet18": 32, "transformer": 16}


def make_batch(name: str, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "transformer":
        tokens = torch.randint(0, 65, (size, 64), generator=generator)
        return tokens, torch.randint(0, 65, (size, 64), generator=generator)
    shape = (size, 784) if name == "mlp" else (size, 3, 32, 32)
    inputs = torch.randn(shape, generator=generator)
    return inputs, torch.randint(0, 10, (size,), generator=generator)


def loss_of(output: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, -2), targets.flatten())


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
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
    if isinstance(model, Transformer):
        model = nn.Sequential(model, nn.Flatten(0, 1))  # It takes two-dimensional outputs only.
    maker = asdl.KfacGradientMaker(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        output = maker.setup_model_call(model, inputs)
        maker.setup_loss_call(functional.cross_entropy, output, targets.flatten())
        maker.forward_and_backward()
        optimizer.step()

    return step


def curvlinops(model: nn.Module, factor: int, inverse: int) -> Step:
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    criterion = nn.CrossEntropyLoss()
    supported = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    parameters = [p for m in supported for p in m.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    network = model
    if isinstance(model, Transformer):
        network = nn.Sequential(model, nn.Flatten(0, 1))
    count = 0
    found: list[object] = [None, None]

    def step(inputs: Tensor, targets: Tensor) -> None:
        nonlocal count
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        gradients = [p.grad for p in parameters]
        if count % factor == 0:
            found[0] = KFACLinearOperator(
                network,
                criterion,
                parameters,
                [(inputs, targets.flatten())],
                check_deterministic=False,
                separate_weight_and_bias=False,
                batch_size_fn=len,
                num_data=len(inputs),
            )
            found[0].compute_kronecker_factors()
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
        if count % inverse == 0:
            found[1] = KFACInverseLinearOperator(found[0], damping=1e-2, use_heuristic_damping=True)
        for p, natural in zip(parameters, found[1] @ gradients, strict=True):
            p.grad = natural
        optimizer.step()
        count += 1

    return step


def nngeometry(model: nn.Module, factor: int, inverse: int) -> Step:
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatKFAC, PVector
    from torch.utils.data import DataLoader, TensorDataset

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    count = 0
    found: list[object] = [None, None]

    def step(inputs: Tensor, targets: Tensor) -> None:
        nonlocal count
        optimizer.zero_grad()
        loss_of(model(inputs), targets).backward()
        if count % factor == 0:
            loader = DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs))
            gradients = [p.grad for p in model.parameters()]
            found[0] = FIM(model, loader, PMatKFAC, variant="classif_logits")
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g
        if count % inverse == 0:
            found[1] = found[0].inverse(1e-2)
        natural = found[1].mv(PVector.from_model_grad(model)).to_dict()
        modules = LayerCollection.from_model(model).get_layerid_module_maps(model)[0]
        for layer, values in natural.items():
            for name, value in zip(("weight", "bias"), values, strict=False):
                getattr(modules[layer], name).grad = value
        optimizer.step()
        count += 1

    return step


def singd(model: nn.Module, factor: int) -> Step:
    from singd.optim.optimizer import SINGD

    return plain(model, SINGD(model, T=factor, lr=1e-4, loss_average="batch"))


def make_step(
    name: str,
    model_name: str,
    batch: int,
    factor: int,
    inverse: int,
    device: str | torch.device = "cpu",
    narrow: int = 1,
) -> Step:
    model = make_model(model_name, narrow).to(device)
    parameters = model.parameters()
    if name == "sgd":
        return plain(model, torch.optim.SGD(parameters, lr=1e-4, momentum=0.9))
    if name == "adamw":
        return plain(model, torch.optim.AdamW(parameters, lr=1e-4))
    if name in OURS:
        return plain(model, OURS[name].make(model, factor, inverse))
    if name in COEFFICIENT_STEPS:
        steps = COEFFICIENT_STEPS[name]
        return plain(model, natgrad.FNGD(model, lr=1e-4, coefficient_steps=steps))
    if name == "curvlinops":
        return curvlinops(model, factor, inverse)
    if name == "nngeometry":
        return nngeometry(model, factor, inverse)
    if name == "asdl":
        return asdl(model, batch, factor, inverse)
    if name == "singd":
        return singd(model, factor)
    raise ValueError(f"unknown method {name!r}")


def available(names: list[str]) -> list[str]:
    kept = []
    for name in names:
        if name in PEERS and find_spec(name) is None:
            print(f"# {name} is not installed, left out", file=sys.stderr)
        else:
            kept.append(name)
    return kept


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    steps: dict[str, Step], batch: tuple[Tensor, Tensor], cycle: int, turns: int
) -> dict[str, list[float]]:
    """Return the mean seconds of a step, by method and turn of one cycle."""
    device = batch[0].device
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(cycle):
                step(*batch)
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / cycle)
    return seconds


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
            narrow=arguments.narrow,
        )
        try:
            for _ in range(3):
                steps[name](*batch)
        except Exception as error:
            if name not in PEERS:
                raise
            print(f"# {name} cannot train this network, left out: {error}", file=sys.stderr)
            del steps[name]
    seconds = take_turns(steps, batch, cycle, arguments.turns)
    print(f"{'method':<10} {'ms/step':>9} {'ratio to sgd':>13} {'min':>6} {'max':>6}")
    for name in steps:
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
        command += ["--batch-size", str(arguments.batch_size), "--narrow", str(arguments.narrow)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak = json.loads(found.stdout.splitlines()[-1])
        print(f"{name:<10} {peak:9.0f} {peak - before:17.0f}")


def one_for_memory(arguments: argparse.Namespace) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = make_step(
        arguments.one, arguments.model, arguments.batch_size, 2, 4, narrow=arguments.narrow
    )
    batch = make_batch(arguments.model, arguments.batch_size)
    for _ in range(6):
        step(*batch)
    print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(BATCH_SIZES), default="mlp")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--narrow", type=int, default=1, help="what widths are divided by")
    parser.add_argument("--factor-interval", type=int, default=10)
    parser.add_argument("--inverse-interval", type=int, default=100)
    parser.add_argument("--methods", default="sgd,adamw,kfac,kfac_fused,asdl,singd")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    arguments.batch_size = arguments.batch_size or BATCH_SIZES[arguments.model]
    if arguments.one:
        one_for_memory(arguments)
        return
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {platform.machine()}; {arguments.model}, "
        f"{f'widths / {arguments.narrow}, ' if arguments.narrow > 1 else ''}batch "
        f"{arguments.batch_size}, factors every {arguments.factor_interval}, inverses every "
        f"{arguments.inverse_interval} steps"
    )
    if arguments.memory:
        measure_memory(arguments)
    else:
        measure(arguments)


if __name__ == "__main__":
    main()

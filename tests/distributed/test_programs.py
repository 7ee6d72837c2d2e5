"""Training programs as people write them, in two processes: the steps of one process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import natgrad
from natgrad.distributed.shards import whole
from tests import processes
from tests.cases import generator
from tests.distributed.networks import SAMPLES, batch, make, soon, summed_loss, weights
from tests.methods import make_optimizer

pytestmark = pytest.mark.slow

Piece = tuple[Tensor, Tensor]

#: Whether this torch keeps parameters in shards on CPUs.
KEEPS_SHARDS = hasattr(torch.cpu.Stream, "record_event")


def shares(step: int) -> list[Piece]:
    x, y = batch("mlp", step)
    return list(zip(x.chunk(2), y.chunk(2), strict=True))


def own(step: int, rank: int | None) -> Piece:
    """Return what a process has of a batch; all of it if it is alone."""
    return batch("mlp", step) if rank is None else shares(step)[rank]


def mean_loss(output: Tensor, y: Tensor, rank: int | None) -> Tensor:
    return summed_loss(output, y) / (SAMPLES if rank is None else SAMPLES / 2)


class Program:
    """A model and its optimizer, alone or in one of two processes.

    Args:
        rank: The process; None for one alone.
        optimizer: Name of the optimizer's class.
        wrap: Makes the model of a process of a plain one.
        options: Those of the optimizer.
    """

    def __init__(
        self,
        rank: int | None,
        optimizer: str = "KFAC",
        wrap: Callable[[nn.Module], Any] = DistributedDataParallel,
        **options: Any,
    ) -> None:
        self.rank = rank
        self.plain = make("mlp")
        self.model: Any = self.plain if rank is None else wrap(self.plain)
        kind = getattr(natgrad, optimizer)
        self.optimizer = make_optimizer(kind, self.model, **(soon(kind) | options))

    def backward(self, x: Tensor, y: Tensor, last: bool = True) -> None:
        waits = self.rank is not None and not last
        with self.model.no_sync() if waits else contextlib.nullcontext():
            mean_loss(self.model(x), y, self.rank).backward()

    def train(self, steps: int = 4) -> Iterator[int]:
        """Take steps; yield their numbers before."""
        for step in range(steps):
            self.optimizer.zero_grad()
            yield step
            self.optimizer.step()


def different_numbers_of_passes(rank: int | None, name: str, **options: Any) -> Tensor:
    """The first process makes three passes of a step, the second one or two."""
    program = Program(rank, name, **options)
    for step in program.train():
        counts = (3, 1 + step % 2)
        pieces = [
            list(zip(x.chunk(count), y.chunk(count), strict=True))
            for (x, y), count in zip(shares(step), counts, strict=True)
        ]
        if rank is None:
            first, second = pieces
            joint = [
                tuple(map(torch.cat, zip(one, *second[i : i + 1], strict=True)))
                for i, one in enumerate(first)
            ]
        else:
            joint = pieces[rank]
        for number, (x, y) in enumerate(joint):
            program.backward(x, y, last=number + 1 == len(joint))
    return weights(program.plain)


def nothing_at_first(rank: int | None, samples: int, **options: Any) -> Tensor:
    """Neither process has a sample that counts in the first two steps."""
    program = Program(rank, factors=3, **options)
    for step in program.train(6):
        x, y = own(step, rank)
        if step < 2:
            x, y = x[:samples], torch.full_like(y, -100)[:samples]
        program.backward(x, y)
    return weights(program.plain)


def ignored_by_one(rank: int | None, at: int, name: str) -> Tensor:
    """No sample of the second process counts in a step that updates curvature."""
    program = Program(rank, name)
    for step in program.train():
        x, y = own(step, rank)
        if step == at and rank != 0:
            y = y.clone()
            y[-SAMPLES // 2 :] = -100
        program.backward(x, y)
    return weights(program.plain)


def unused_found(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def in_shards(model: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **options)
    return model


def offloaded(model: Any) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return in_shards(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def but_for_the_last_layer(model: Any) -> Any:
    return in_shards(model, ignored_params=set(model[4].parameters()))


def frozen_meanwhile(rank: int | None, wrap: Callable[[nn.Module], Any], **options: Any) -> Tensor:
    """A layer is frozen for some steps, and comes back to what was known of it."""
    program = Program(rank, wrap=wrap, **options)
    layers: Any = program.plain
    for step in program.train(6):
        if step in (2, 4):
            layers[2].requires_grad_(step == 4)
        program.backward(*own(step, rank))
        if rank is not None and wrap is but_for_the_last_layer:  # Whose gradients are local.
            for parameter in layers[4].parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= 2
    return torch.cat([whole(p).detach().flatten() for p in program.plain.parameters()])


def resumed(
    rank: int | None, wrap: Callable[[nn.Module], Any], broadcast: bool, **options: Any
) -> Tensor:
    """A full state is saved by ``torch.save`` in the middle, and loaded by all or by the first."""
    from torch.distributed.checkpoint import state_dict as states

    program = Program(rank, wrap=wrap, **options)
    for step in program.train(3):
        program.backward(*own(step, rank))
    if rank is not None:
        kind = states.StateDictOptions(full_state_dict=True, cpu_offload=broadcast)
        saved = io.BytesIO()
        torch.save(states.get_state_dict(program.model, program.optimizer, options=kind), saved)
        saved.seek(0)
        model, optimizer = torch.load(saved, weights_only=True)
        if broadcast and rank:
            assert not model and not optimizer  # Another process has them.
        program = Program(rank, wrap=wrap, **options)
        kind = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        states.set_model_state_dict(program.model, model, options=kind)
        states.set_optimizer_state_dict(program.model, program.optimizer, optimizer, options=kind)
    for step in program.train(3):
        program.backward(*own(step + 3, rank))
    return torch.cat([whole(p).detach().flatten() for p in program.plain.parameters()])


def sharded_later(rank: int | None, outermost: bool, **options: Any) -> Tensor:
    """Parameters are sharded after the optimizer was made, and perhaps put in their places."""
    program = Program(rank, wrap=lambda model: model, **options)
    groups = program.optimizer.param_groups
    if rank is not None and outermost:
        from torch.distributed.fsdp import fully_shard

        fully_shard(program.plain, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        present = dict(program.plain.named_parameters())
        for group in groups:  # As Accelerate does it.
            group["params"] = [present[name] for name in group["param_names"]]
    elif rank is not None:
        in_shards(program.plain)
    for step in program.train():
        program.backward(*own(step, rank))
    return torch.cat([whole(p).detach().flatten() for p in program.plain.parameters()])


def looked_at_by_the_first(rank: int | None) -> Tensor:
    """The first process looks at gradients and evaluates, past the wrapper and in its own time."""
    program = Program(rank)
    for step in program.train():
        if rank != 1:
            x, y = batch("mlp", 9)
            loss = functional.cross_entropy(program.plain(x), y)
            torch.autograd.grad(loss, list(program.plain.parameters()))
            functional.cross_entropy(program.plain(x), y).backward()
            program.optimizer.zero_grad()
            with torch.no_grad():
                program.plain.eval()(x)
            program.plain.train()
        program.backward(*own(step, rank))
    return weights(program.plain)


def accumulated_and_reduced(rank: int | None) -> Tensor:
    """Every pass of a step reduces gradients, into views of buckets of a static graph."""

    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)

    program = Program(rank, wrap=wrap)
    for step in program.train():
        both = [list(zip(x.chunk(2), y.chunk(2), strict=True)) for x, y in shares(step)]
        joint = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*both, strict=True)]
        for x, y in joint if rank is None else both[rank]:
            program.backward(x, y)
    return weights(program.plain)


def scaled(rank: int | None) -> Tensor:
    """Losses are scaled, gradients clipped, rates follow a schedule; one overflows on the way."""
    program = Program(rank, length="lr", lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    schedule = torch.optim.lr_scheduler.LinearLR(program.optimizer, 1.0, 0.1, total_iters=5)
    for step in range(5):
        x, y = (one.clone() for one in own(step, rank))
        if step == 2 and rank != 0:
            x[-1, 0] = torch.inf
        program.optimizer.zero_grad()
        scaler.scale(mean_loss(program.model(x), y, rank)).backward()
        scaler.unscale_(program.optimizer)
        nn.utils.clip_grad_norm_(program.model.parameters(), 0.5)
        scaler.step(program.optimizer)
        scaler.update()
        schedule.step()
    return weights(program.plain)


def adversaries(rank: int | None) -> Tensor:
    """Two wrapped models, of which one is frozen while it shows the other its faults."""
    torch.manual_seed(0)
    plain = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double(),
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double(),
    )
    models: Any = plain if rank is None else tuple(map(DistributedDataParallel, plain))
    makes, judges = models
    optimizers = [
        make_optimizer(natgrad.KFAC, model, likelihood, **soon(natgrad.KFAC), fisher="exact")
        for model, likelihood in zip(models, ("gaussian", "bernoulli"), strict=True)
    ]
    loss_of = functional.binary_cross_entropy_with_logits
    for step in range(4):
        z, x = (
            torch.randn(16, size, generator=generator(step), dtype=torch.float64) for size in (4, 5)
        )
        if rank is not None:
            z, x = z.chunk(2)[rank], x.chunk(2)[rank]
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        optimizers[1].zero_grad()
        found = judges(torch.cat([x, makes(z).detach()]))
        loss_of(found, torch.cat([ones, 0 * ones])).backward()
        optimizers[1].step()
        plain[1].requires_grad_(False)
        optimizers[0].zero_grad()
        loss_of(plain[1](makes(z)), ones).backward()
        plain[1].requires_grad_(True)
        optimizers[0].step()
    return torch.cat([weights(model) for model in plain])


def compiled(rank: int | None) -> Tensor:
    def wrap(model: nn.Module) -> Any:
        return torch.compile(DistributedDataParallel(model), backend="aot_eager")

    program = Program(rank, wrap=wrap)
    for step in program.train(3):
        program.backward(*own(step, rank))
    return weights(program.plain)


def replicated_by_shards(rank: int | None) -> Tensor:
    """What ``fully_shard`` makes of whole replicas."""

    def wrap(model: nn.Module) -> Any:
        from torch.distributed._composable.replicate_with_fsdp import replicate

        return replicate(model)

    program = Program(rank, wrap=wrap)
    for step in program.train():
        program.backward(*own(step, rank))
    return torch.cat([whole(p).detach().flatten() for p in program.plain.parameters()])


def has_replicas_by_shards() -> bool:
    try:
        from torch.distributed._composable import replicate_with_fsdp
    except ImportError:
        return False
    return hasattr(replicate_with_fsdp, "ReplicateModule")


def programs() -> dict[str, Callable[[int | None], Tensor]]:
    found: dict[str, Callable[[int | None], Tensor]] = {
        f"different numbers of passes, {name}": lambda rank, name=name: different_numbers_of_passes(
            rank, name, damping=0.1
        )
        for name in ("KFAC", "EKFAC", "SINGD", "FNGD", "ExactNGD")
    }
    found |= {
        "none that counts at first": lambda rank: nothing_at_first(rank, 8),
        "no sample at first": lambda rank: nothing_at_first(rank, 0),
        "none that counts at first, memory": lambda rank: nothing_at_first(
            rank, 8, sharing="memory"
        ),
        **{
            f"all ignored by one in step {at}, {name}": lambda rank, at=at, name=name: (
                ignored_by_one(rank, at, name)
            )
            for at, name in ((0, "KFAC"), (2, "KFAC"), (0, "EKFAC"), (2, "ExactNGD"))
        },
        "frozen meanwhile": lambda rank: frozen_meanwhile(rank, unused_found),
        "frozen meanwhile, memory": lambda rank: frozen_meanwhile(
            rank, unused_found, sharing="memory"
        ),
        **{
            f"resumed, {broadcast=}": lambda rank, broadcast=broadcast: resumed(
                rank, DistributedDataParallel, broadcast
            )
            for broadcast in (False, True)
        },
        "looked at by the first": looked_at_by_the_first,
        "accumulated and reduced": accumulated_and_reduced,
        "scaled": scaled,
        "adversaries": adversaries,
        "compiled": compiled,
    }
    if KEEPS_SHARDS:
        for wrap in (in_shards, offloaded, but_for_the_last_layer):
            found[f"frozen meanwhile, {wrap.__name__}"] = lambda rank, wrap=wrap: frozen_meanwhile(
                rank, wrap, sharing="memory"
            )
    if has_replicas_by_shards():
        found["replicated by shards"] = replicated_by_shards
    return found


def flat(rank: int, late: bool, original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = make("mlp")
    optimizer = natgrad.KFAC(plain) if late else None
    model = FullyShardedDataParallel(plain, use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = optimizer or natgrad.KFAC(model)
    functional.cross_entropy(model(own(0, rank)[0]), own(0, rank)[1]).backward()
    optimizer.step()


def composed(rank: int, late: bool) -> None:
    from torch.distributed._composable import replicate

    model = make("mlp")
    optimizer = natgrad.KFAC(model) if late else None
    replicate(model)
    optimizer = optimizer or natgrad.KFAC(model)
    model(own(0, rank)[0])
    optimizer.step()


def staged(rank: int) -> None:
    from torch.distributed.pipelining import PipelineStage

    model: Any = make("mlp")
    layers = model[:2] if rank == 0 else model[2:]
    stage = PipelineStage(
        layers, rank, 2, torch.device("cpu"),
        input_args=(torch.zeros(8, 5 if rank == 0 else 8, dtype=torch.float64),),
        output_args=(torch.zeros(8, 8 if rank == 0 else 3, dtype=torch.float64),),
    )  # fmt: skip
    optimizer = natgrad.KFAC(layers)
    stage.forward_maybe_with_nosync(torch.zeros(8, 5 if rank == 0 else 8, dtype=torch.float64))
    optimizer.step()


def given_parameters(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(make("mlp"))
    ZeroRedundancyOptimizer(model.parameters(), optimizer_class=natgrad.KFAC, lr=0.1)


def posterior(rank: int) -> None:
    model = DistributedDataParallel(make("mlp"))
    natgrad.VariationalLaplace(model, own(0, rank), "categorical")


def scored(rank: int) -> None:
    natgrad.tools.influence(DistributedDataParallel(make("mlp")), own(0, rank), own(1, rank))


def anchored(rank: int) -> None:
    model = make("mlp")
    matrix = natgrad.fisher_matrix(model, own(0, None), structure="diagonal")
    natgrad.tools.ewc_penalty(matrix, in_shards(model))


#: What is refused → who does it, and what is said.
REFUSED: dict[str, tuple[Callable[[int], None], str]] = {
    **{
        f"FSDP1, {late=}, {original=}": (
            lambda rank, late=late, original=original: flat(rank, late, original),
            "(FSDP1), of which no part is a matrix to be preconditioned: shard the model with",
        )
        for late in (False, True)
        for original in (False, True)
    },
    **{
        f"replicate, {late=}": (
            lambda rank, late=late: composed(rank, late),
            "replicated by replicate() of torch.distributed._composable",
        )
        for late in (False, True)
    },
    "pipeline": (staged, "the model is a stage of a pipeline"),
    "VariationalLaplace": (posterior, "is made of the data of one process"),
    "influence": (scored, "is made of the data of one process"),
    **({"tools": (anchored, "is sharded")} if KEEPS_SHARDS else {}),
    "ZeroRedundancyOptimizer": (given_parameters, "takes the model itself, not its parameters"),
}


def everything(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: run(rank) for name, run in programs().items()}
    for name, (attempt, _) in REFUSED.items():
        try:
            attempt(rank)
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return processes.run(everything)


@pytest.mark.filterwarnings("ignore")
def test_programs_take_the_steps_of_one_process(found: list[dict[str, Any]]) -> None:
    start, wrong = weights(make("mlp")), {}
    for name, run in programs().items():
        first, second = (each[name] for each in found)
        assert torch.equal(first, second), name
        alone = run(None)
        assert alone.isfinite().all(), name
        way = alone - start if alone.shape == start.shape else alone
        error = float((first - alone).norm() / way.norm())
        if not error < 1e-10:
            wrong[name] = error
    assert not wrong


@pytest.mark.parametrize("name", REFUSED)
def test_other_ways_to_share_a_model_are_refused(found: list[dict[str, Any]], name: str) -> None:
    for each in found:
        assert REFUSED[name][1] in each.get(name, "nothing was said")

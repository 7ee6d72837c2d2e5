"""What curvature shared by many processes takes, on paper: from a model's shapes alone.

For a method, a number of ranks (processes) and a sharing mode (``Refresh(sharing=...)``) it states
what the fullest process keeps, what each hands to collectives, and what the busiest computes, and
predicts from these the time that natgrad adds to a step.

Data is moved as by rings. With N ranks an all-reduce of n bytes moves 2(N−1)/N·n through the link
of each process; an all-gather, a gather, a reduce or a broadcast (N−1)/N·n, where n is the size of
the whole result: of a gathered one N times what the process that sends most hands in, as the others
pad theirs. Where that would be too much each process broadcasts what it has. Pieces that processes
hand each other move (N−1)/N·n, n what the busiest hands in or is handed. Nothing is taken to
overlap, and latencies are left out.

With parameters in shards (FSDP2) the gradient of a layer goes to the process that owns the layer,
shards of its natural gradient come back, and no parameters are sent. Of replicas of shards (HSDP)
those of the owner's replica send it the gradient, and all replicas get shards back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from natgrad.capture import Capture
from natgrad.capture.kinds import find_kind
from natgrad.curvature import Curvature, as_structure
from natgrad.curvature.cost import Workload
from natgrad.curvature.sharing import Sharing, holders_of, rounds_of
from natgrad.distributed.exchange import is_padded
from natgrad.experiments.factories import FactoryError, load_model
from natgrad.experiments.inspection import InspectionError
from natgrad.fisher import as_fisher_type
from natgrad.optim import EKFAC, KFAC, KPSVD, TEKFAC, TKFAC, NaturalGradient

#: Name → optimizer of the methods whose curvature processes can share.
METHODS: dict[str, type[NaturalGradient]] = {
    method.__name__.lower(): method for method in (KFAC, EKFAC, TKFAC, TEKFAC, KPSVD)
}

#: Fractions of the processes that keep each layer, which are planned for where they are some.
FRACTIONS = (1 / 2, 1 / 4, 1 / 8)

Collective = Literal[
    "all_reduce", "reduce", "all_gather", "gather", "broadcast", "all_to_all", "reduce_scatter"
]


class PlanError(ValueError):
    """Options that nothing can be planned for; the message says why."""


@dataclass(frozen=True)
class Options:
    """What a plan is made for: options of ``natgrad plan``, whose help explains them.

    None stands for the method's own interval, and for no limit of the memory. Positions of
    convolutions are at least two. Shards are cut along the first dimension, over the processes of
    one replica, of ranks one after the other. A `PlanError` says that an option is out of range.
    """

    method: str = "kfac"
    ranks: tuple[int, ...] = (8,)
    samples: int = 128
    positions: int = 1
    factors: int | None = None
    inverses: int | None = None
    bandwidth: float = 25.0
    throughput: float = 20.0
    memory: float | None = None
    shards: bool = False
    replicas: int = 1

    @staticmethod
    def of_mesh(text: str) -> dict[str, Any]:
        """Return the options that a mesh of replicas by shards, as ``8x128``, stands for.

        Raises:
            PlanError: If it is none.
        """
        sizes = [int(one) if one.isdecimal() else 0 for one in text.lower().split("x")]
        if len(sizes) not in (1, 2) or min(sizes) < 1:
            raise PlanError(
                "A mesh is a number of shards, or of replicas and of shards as 8x128, not "
                f"{text!r}."
            )
        replicas, shards = sizes if len(sizes) == 2 else (1, *sizes)
        return {"ranks": str(replicas * shards), "replicas": replicas, "shards": True}

    def __post_init__(self) -> None:
        """Check the options."""
        if self.method not in METHODS:
            raise PlanError(f"The method must be one of {', '.join(METHODS)}, not {self.method!r}.")
        if not self.ranks or min(self.ranks) < 1:
            raise PlanError(f"The ranks must be positive numbers, not {self.ranks}.")
        for name in ("samples", "positions", "factors", "inverses", "replicas"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise PlanError(f"The number of {name} must be at least 1, not {value}.")
        for name in ("bandwidth", "throughput", "memory"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise PlanError(f"The {name} must be positive, not {value:g}.")
        if self.replicas > 1 and not self.shards:
            raise PlanError("Replicas are of parameters in shards, which --shards plans for.")
        if any(ranks % self.replicas for ranks in self.ranks):
            raise PlanError(f"The {self.replicas} replicas must divide the ranks {self.ranks}.")


@dataclass(frozen=True)
class Message:
    """What each process hands to a collective of ``torch.distributed``, every so many steps.

    `size` is in bytes, padded to those of the process that has most; of ``"all_to_all"`` the most
    that one hands in or is handed. `among` is the number of processes N that take part.
    """

    collective: Collective
    size: int
    interval: int = 1
    among: int = 1

    @property
    def per_step(self) -> float:
        """Bytes that a process hands in per step."""
        return self.size / self.interval

    @property
    def moved(self) -> float:
        """Bytes per step that pass through the link of a process, by the rings of the module."""
        number = self.among
        whole = self.per_step * (number if self.collective in ("all_gather", "gather") else 1)
        return (2 if self.collective == "all_reduce" else 1) * (number - 1) / number * whole


@dataclass(frozen=True)
class SharedWork:
    """What one sharing mode takes with one number of processes.

    Bytes are those of the process with most: `memory` of factors and inverses, `model` of trained
    parameters, their gradients and momentum, `owned` of the natural gradients (with shards of whole
    gradients, too) that it has for a moment. An update takes `sums` over the batch, of symmetric
    matrices the triangles, and `rows` of methods that keep them; then a fraction of the processes
    adds up and hands on those of the layers it keeps. After a factorisation come `inverses`, and
    the trained `parameters` of rank 0. `gradients` are what the model's wrapper averages at every
    step, which is none of natgrad's, as are the parameters that it gathers from shards.

    `factorisation`, `statistics` and `preconditioning` are floating-point operations per step of
    the process that has most to do: two per multiplication of
    :class:`natgrad.curvature.cost.Cost`, which counts d³ for any factorisation of a factor, though
    eigendecompositions take several times as much. `communication` and `computation` are predicted
    seconds per step of natgrad's own.
    """

    ranks: int
    sharing: Sharing | float
    memory: int
    model: int
    owned: int
    sums: Message
    rows: Message
    column_sums: Message
    column_rows: Message
    inverses: Message
    whole_gradients: Message
    natural_gradients: Message
    parameters: Message
    gradients: Message
    replica_gradients: Message
    factorisation: float
    statistics: float
    preconditioning: float
    communication: float
    computation: float

    @property
    def messages(self) -> tuple[Message, ...]:
        """All of natgrad's messages."""
        found = [value for value in vars(self).values() if isinstance(value, Message)]
        return tuple(found[:-2])  # But for those of the wrapper.

    @property
    def sent(self) -> float:
        """Bytes per step that a process hands to natgrad's collectives."""
        return sum(message.per_step for message in self.messages)

    @property
    def moved(self) -> float:
        """Bytes per step that natgrad's collectives move through the link of a process."""
        return sum(message.moved for message in self.messages)

    @property
    def seconds(self) -> float:
        """Predicted seconds per step that natgrad adds."""
        return self.communication + self.computation


@dataclass(frozen=True)
class Plan:
    """What a model takes in every sharing mode, with every number of ranks.

    `options` have the intervals filled in; `parameters` counts frozen ones, too, `covered` those
    that are preconditioned, `parts` the layers that are factorised; `works` are in the order of
    ranks and modes.
    """

    options: Options
    parameters: int
    covered: int
    parts: int
    works: tuple[SharedWork, ...]


def sharings(ranks: int) -> tuple[Sharing | float, ...]:
    """Return the modes for a number of ranks, the default first."""
    fractions = (f for f in FRACTIONS if f * ranks > 1 and f * ranks % 1 == 0)
    return ("inverses", *fractions, "memory", "nothing")


def parse_ranks(text: str) -> tuple[int, ...]:
    """Return numbers of ranks given as ``1,8,64``; a PlanError says that they are none."""
    try:
        ranks = tuple(int(one) for one in text.split(","))
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise PlanError(
            f"Ranks are positive numbers separated by commas, for example 8,64, not {text!r}."
        )
    return ranks


def plan_factory(specification: str, options: Options) -> Plan:
    """Plan for the model of a factory, made without memory (on the meta device) where possible.

    A factory, see `factories.load_model`, that cannot do without values is called on the CPU.
    Raises `FactoryError` or `InspectionError` if there is no model with trainable parameters that
    can be preconditioned.
    """
    try:
        return plan_model(load_model(specification, torch.device("meta")).model, options)
    except (FactoryError, InspectionError, NotImplementedError, RuntimeError):
        return plan_model(load_model(specification).model, options)


def plan_model(model: nn.Module, options: Options) -> Plan:
    """Plan for a model, on any device, of which nothing but shapes and types matters.

    Modules of unknown kind that are on the meta device have their parameters replaced, as such are
    told by what they compute.
    """
    method = METHODS[options.method].method
    _give_values_to_unknown(model)
    try:
        with Capture(model, leaves_complex=True) as capture:
            layouts = {name: block.layout for name, block in capture.blocks.items()}
            convolutions = {name for name, block in capture.blocks.items() if "Conv" in block.kind}
            structure = as_structure(method.structure, training=True)
            curvature = Curvature(structure, layouts, capture.layout)
    except ValueError as error:
        raise InspectionError(f"{str(error).rstrip('.')}.") from error
    own, parameters = method.refresh, list(model.parameters())
    updates, turns = options.factors or own.factors, options.inverses or own.inverses
    options = replace(options, factors=updates, inverses=turns)
    trained = [(p.dtype.itemsize, p.shape) for p in parameters if p.requires_grad]
    positions = dict.fromkeys(curvature.parts, options.positions)
    positions |= dict.fromkeys(convolutions, max(2, options.positions))
    directions = as_fisher_type(method.fisher).directions(1)
    works = tuple(
        _shared_work(curvature, options, ranks, sharing, directions, trained, positions)
        for ranks in options.ranks
        for sharing in sharings(ranks)
    )
    covered = sum(block.numel for block in layouts.values())
    count = sum(p.numel() for p in parameters)
    return Plan(options, count, covered, len(curvature.parts), works)


def _give_values_to_unknown(model: nn.Module) -> None:
    """Make weights of modules that are tried out, see :mod:`natgrad.capture.likeness`."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        plain = not any(True for _ in module.children())
        own = dict(module.named_parameters(recurse=False))
        if plain and "weight" in own and find_kind(module) is None:
            for parameter in own.values():
                if parameter.is_meta and parameter.dim() <= 2:
                    ones = torch.ones_like(parameter, device="cpu")
                    made[parameter] = nn.Parameter(ones, parameter.requires_grad)
    for module in model.modules() if made else ():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in made:
                setattr(module, name, made[parameter])


def _shared_work(
    curvature: Curvature,
    options: Options,
    ranks: int,
    sharing: Sharing | float,
    directions: int,
    trained: Sequence[tuple[int, Sequence[int]]],
    positions: Mapping[str, int],
) -> SharedWork:
    """Return what one sharing mode takes; messages are those of the column that moves most.

    `directions` are pulled back per sample, `trained` are bytes of an entry and shape of the
    parameters that have gradients, `positions` of a sample share the weight of a part.
    """
    structure, parts = curvature.structure, curvature.parts
    batch = Workload(ranks * options.samples, directions, positions, ranks)
    costs, alone = curvature.costs(batch), curvature.costs(Workload(0, directions, {}, ranks))
    factorisation = {name: cost.refresh for name, cost in alone.items()}
    joint = {name: structure.joint_work(part, batch) for name, part in parts.items()}
    elements = {name: structure.elements(part, batch) for name, part in parts.items()}
    entry = {name: part.dtype.itemsize for name, part in parts.items()}
    height = holders_of(sharing, ranks)
    kept = curvature.balanced(list(parts), ranks // height)
    by_column = [curvature.balanced(names, height) for names in kept]
    if sharing == "nothing":
        by_column = [kept]
    divided = [names for column in by_column for names in column]

    def fullest(values: Mapping[str, float], lists: list[list[str]]) -> float:
        return max(sum(values[name] for name in names) for names in lists)

    def in_bytes(field: str, names: Sequence[str]) -> int:
        return sum(entry[name] * getattr(elements[name], field) for name in names)

    def exchanged(field: Mapping[str, float], lists: list[list[str]]) -> tuple[Collective, int]:
        """Return how processes hand out what they have, and how much."""
        owned = [int(sum(field[name] for name in names)) for names in lists]
        if is_padded(owned):
            return "broadcast", sum(owned)
        return "all_gather", max(owned)

    def message(kind: Collective, size: int, interval: int | None = 1, among: int = 0) -> Message:
        among = among or ranks
        return Message(kind, size if among > 1 else 0, interval or 1, among)

    columns, shares, everything = len(kept), sharing != "nothing", list(parts)
    updates, turns = options.factors, options.inverses
    gradient = {name: entry[name] * part.block.numel for name, part in parts.items()}
    handed_out = {name: entry[name] * one.handed_out for name, one in elements.items()}
    steps = {name: cost.step for name, cost in costs.items()}
    shards, owned = options.shards and ranks > 1, int(fullest(gradient, divided))
    shapes = [(entry[name], shape) for name in parts for shape in parts[name].block.shapes]
    natural = message("all_reduce", 0 if shares else sum(gradient.values()))
    cut = ranks // options.replicas  # Each parameter is, into so many shards.
    size = _in_shards(shapes, cut) if shards and not shares else 0
    whole = message("all_gather", size, among=cut)
    sums = message("all_reduce", in_bytes("sums", everything), updates)
    rows = message("all_gather", in_bytes("rows", everything), updates)
    if columns > 1:
        natural = message(*exchanged(gradient, kept), among=columns)
        sums = message("reduce", sums.size, updates, columns)
        rows = message("gather", rows.size, updates, columns)
    if shards and shares:
        handed_in = [
            _in_shards([(entry[n], one) for n in names for one in parts[n].block.shapes], cut)
            for names in (sum(divided[i : i + cut], []) for i in range(0, ranks, cut))
        ]
        whole = message("all_to_all", max(owned, *handed_in))
        handed_back = options.replicas * owned
        natural = message("all_to_all", max(handed_back, _in_shards(shapes, cut)))
    everywhere = _in_shards(trained, 1)
    sent = everywhere if shares and height > 1 and not shards else 0
    averaged = message("all_reduce", everywhere)
    if shards:
        averaged = message("reduce_scatter", everywhere, among=cut)
    replicated = _in_shards(trained, cut) if shards else 0

    # Sums are made of a process's own samples, what takes the rows of all is made of all.
    own = sum(costs[name].refresh - factorisation[name] - joint[name] for name in parts) / ranks
    factorising = 2 * fullest(factorisation, divided) / (turns or 1)
    summing = 2 * (own + fullest(joint, kept)) / (updates or 1)
    preconditioning = 2 * fullest(steps, divided if shards else kept)

    def inverses_of(seats: list[list[str]]) -> tuple[Collective, int]:
        """Return how processes hand out their inverses, round by round, and how much."""
        rounds = [exchanged(handed_out, one) for one in rounds_of(seats, parts)]
        if all(kind == "broadcast" for kind, _ in rounds):
            return "broadcast", sum(size for _, size in rounds)
        each = (size if kind == "all_gather" else size // len(seats) for kind, size in rounds)
        return "all_gather", sum(each)

    def of_column(names: list[str], seats: list[list[str]]) -> SharedWork:
        kind, made = inverses_of(seats)
        again = height if columns > 1 else 1  # Of one column there is nothing left to do.
        return SharedWork(
            ranks=ranks,
            sharing=sharing,
            memory=max(in_bytes("kept", each) for each in kept),
            model=3 * _in_shards(trained, cut if shards else 1),
            owned=2 * owned if shards else sum(gradient.values()),
            sums=sums,
            rows=rows,
            column_sums=message("all_reduce", in_bytes("sums", names), updates, again),
            column_rows=message("all_gather", columns * in_bytes("rows", names), updates, again),
            inverses=message(kind, made if shares else 0, turns, height),
            whole_gradients=whole,
            natural_gradients=natural,
            parameters=message("broadcast", sent, turns),
            gradients=averaged,
            replica_gradients=message("all_reduce", replicated, among=options.replicas),
            factorisation=factorising,
            statistics=summing,
            preconditioning=preconditioning,
            communication=0.0,
            computation=(factorising + summing + preconditioning) / (1e12 * options.throughput),
        )

    work = max(map(of_column, kept, by_column), key=lambda one: one.moved)
    return replace(work, communication=work.moved / (1e9 * options.bandwidth))


def _in_shards(tensors: Sequence[tuple[int, Sequence[int]]], ranks: int) -> int:
    """Return the bytes that the first of some processes has of tensors cut along their rows."""
    rows = [(entry, -(-shape[0] // ranks) if shape else 1, shape) for entry, shape in tensors]
    return sum(entry * count * prod(shape[1:]) for entry, count, shape in rows)


def best(plan: Plan, ranks: int) -> SharedWork | None:
    """Return the mode of least predicted time with so many ranks, of those that fit the memory.

    Of equals the first of :func:`sharings` is taken; None stands for none that fits.
    """
    limit = plan.options.memory
    most = float("inf") if limit is None else limit * 2**30
    fitting = (work for work in plan.works if work.ranks == ranks and work.memory <= most)
    return min(fitting, key=lambda work: work.seconds, default=None)


def advice(plan: Plan) -> str:
    """Return one sentence that says which mode to take."""
    by_mode: dict[str | float | None, list[str]] = {}
    for ranks in dict.fromkeys(plan.options.ranks):
        found = best(plan, ranks)
        by_mode.setdefault(None if found is None else found.sharing, []).append(str(ranks))
    limit = "" if plan.options.memory is None else f" within {plan.options.memory:g} GiB"
    none = by_mode.pop(None, [])
    chosen = [f"sharing={mode!r} with {_listed(ranks)}" for mode, ranks in by_mode.items()]
    refused = f"no mode keeps{limit} with {_listed(none)}" if none else ""
    if not chosen:
        return f"{refused[0].upper()}{refused[1:]}."
    end = f"; {refused}." if refused else "."
    return f"Take {', '.join(chosen)}, for the least predicted time{limit}{end}"


def _listed(ranks: Sequence[str]) -> str:
    *first, last = ranks
    numbers = f"{', '.join(first)} and {last}" if first else last
    return f"{numbers} rank" if numbers == "1" else f"{numbers} ranks"


def to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values, for JSON.

    Every entry of ``"works"`` has, besides its fields, ``"sent"``, ``"moved"`` (bytes per step and
    process) and ``"seconds"`` (per step); ``"best"`` maps ranks to modes, None where none fits.
    """
    works = [
        {**asdict(work), "sent": work.sent, "moved": work.moved, "seconds": work.seconds}
        for work in plan.works
    ]
    chosen = {str(ranks): best(plan, ranks) for ranks in plan.options.ranks}
    modes = {ranks: None if work is None else work.sharing for ranks, work in chosen.items()}
    return {**asdict(plan), "works": works, "best": modes, "advice": advice(plan)}

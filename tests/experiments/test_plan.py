"""What a plan says beforehand, against what processes keep and send."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.cli import run
from natgrad.curvature import KroneckerFactors
from natgrad.distributed.shards import is_sharded, own_shard
from natgrad.experiments.plan import (
    METHODS,
    Message,
    Options,
    PlanError,
    advice,
    best,
    parse_ranks,
    plan_factory,
    plan_model,
    sharings,
    to_dict,
)
from tests import processes
from tests.distributed.counting import Received
from tests.distributed.networks import Transformer
from tests.distributed.test_failures import noting
from tests.distributed.test_shared_work import WIDTHS, sent
from tests.methods import make_optimizer
from tests.test_cli import refused

SAMPLES = 8
COLLECTIVES = ("all_reduce", "reduce", "all_gather", "gather", "broadcast", "all_gather_object")


def wide() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
    return nn.Sequential(*layers).double()


# -- against processes -----------------------------------------------------------------------------


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GroupNorm(4, 48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 40),
    ]  # fmt: skip
    return nn.Sequential(*layers).double()


def speaking() -> nn.Module:
    """Return a transformer whose embedding is tied to its output."""
    torch.manual_seed(0)
    return Transformer(300, 64, 16).double()


def data_of(network: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of a process."""
    source = torch.Generator().manual_seed(seed)
    if network == "speaking":
        tokens = torch.randint(0, 300, (SAMPLES, 17), generator=source)
        return tokens[:, :-1], tokens[:, 1:].flatten()
    shape = {"wide": (WIDTHS[0],), "convolutional": (3, 12, 12)}[network]
    return torch.randn(SAMPLES, *shape, generator=source).double(), torch.arange(SAMPLES) % 5


NETWORKS = {"wide": wide, "convolutional": convolutional, "speaking": speaking}
#: Network and method; in two processes, but for what is only seen in four.
RUNS = [*(("wide", name) for name in METHODS), ("convolutional", "kfac"), ("speaking", "kfac")]
IN_FOUR = [("wide", "kfac"), ("wide", "ekfac"), ("speaking", "kfac")]
#: Processes, network, method and mode.
CASES = [
    (world, *run, sharing)
    for run in RUNS
    for sharing in sharings(4)
    for world in [4 if run in IN_FOUR or sharing not in sharings(2) else 2]
]


def training(rank: int) -> dict[Any, Any]:
    """Train for three steps in every mode; note what is sent in each, and what is kept.

    Curvature is updated in steps 0 and 2, and factorised in step 0.
    """
    log: list[tuple[str, Any]] = []
    for collective in COLLECTIVES:
        setattr(torch.distributed, collective, noting(collective, log))
    found = {}
    for world, network, name, sharing in CASES:
        if world == torch.distributed.get_world_size():
            model = nn.parallel.DistributedDataParallel(NETWORKS[network]())
            options = {"factors": 2, "inverses": 4, "early": False, "sharing": sharing, "lr": 1e-3}
            # Plain steps and much damping: nothing is taken back or tried again.
            optimizer = make_optimizer(METHODS[name], model, damping=0.1, **options)
            logs = []
            for step in range(3):
                log.clear()
                x, y = data_of(network, 100 * step + rank)
                functional.cross_entropy(model(x).flatten(0, -2), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                logs.append(sent(log))
            estimates = optimizer.preconditioner.curvature.estimates.values()
            found[network, name, sharing] = {"logs": logs[::-1], "kept": held(estimates)}
    return found


def held(estimates: Any) -> int:
    """Return the bytes of the tensors of estimates, each once, without scalars."""
    records = [r for one in estimates for r in (one.average, one.inverse) if r is not None]
    tensors = [t for record in records for t in record.tensors() if t.dim()]
    return sum({t.data_ptr(): t.numel() * t.dtype.itemsize for t in tensors}.values())


@functools.cache
def trained(world: int) -> list[Any]:
    return processes.run(training, world=world)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "network", "name", "sharing"), CASES)
def test_processes_keep_and_send_what_is_planned(
    world: int, network: str, name: str, sharing: Any
) -> None:
    positions = 16 if network == "speaking" else 1
    options = Options(name, (world,), SAMPLES, positions, factors=2, inverses=4)
    plan = plan_model(NETWORKS[network](), options)
    (work,) = (one for one in plan.works if one.sharing == sharing)
    step = (work.natural_gradients,)
    update = (*step, work.sums, work.rows, work.column_sums, work.column_rows)
    factorisation = (*update, work.inverses, work.parameters)
    assert sum(m.per_step for m in factorisation) == work.sent
    logs = [each[network, name, sharing]["logs"] for each in trained(world)]
    for each, messages in zip(zip(*logs, strict=True), (update, step, factorisation), strict=True):
        planned = dict.fromkeys(COLLECTIVES, 0.0)
        for message in messages:
            planned[message.collective] += message.size / 8
        most = max(each, key=lambda log: sum(log.values()))
        # Columns of a grid differ; where there is but one or a process is one, all are alike.
        alike = not isinstance(sharing, float)
        assert sum(most.values()) == pytest.approx(sum(planned.values()), rel=0.05, abs=200)
        if not alike and network == "speaking":
            continue  # In its column the second sums of a tied weight are more than that.
        for log in each if alike else [most]:
            for collective, elements in planned.items():
                found = log.get(collective, 0)
                if elements:
                    assert found == pytest.approx(elements, rel=0.05), (collective, messages)
                else:  # Some tens of numbers that decide about the step.
                    assert found < 200, (collective, messages)
    kept = max(each[network, name, sharing]["kept"] for each in trained(world))
    if network == "speaking":  # But for the sums of a tied weight's other uses.
        assert kept == pytest.approx(work.memory, rel=0.05)
    else:
        assert kept == work.memory


# -- in shards -------------------------------------------------------------------------------------

SHARDED = ("kfac", "ekfac")


def training_in_shards(rank: int, replicas: int) -> dict[Any, Any]:
    """Train likewise with parameters in replicas of shards; note what is kept of them, too."""
    from torch.distributed.fsdp import fully_shard

    log: list[tuple[str, Any]] = []
    for collective in COLLECTIVES:
        setattr(torch.distributed, collective, noting(collective, log))
    swap = torch.distributed.all_to_all_single

    def swapped(arrived: Tensor, flat: Tensor, *rest: Any, **options: Any) -> Any:
        log.append(("all_to_all", [max(arrived.numel(), flat.numel())]))
        return swap(arrived, flat, *rest, **options)

    torch.distributed.all_to_all_single = swapped
    world = torch.distributed.get_world_size()
    cut, found = world // replicas, {}
    names = ("replicas", "shards")
    mesh = torch.distributed.init_device_mesh("cpu", (replicas, cut), mesh_dim_names=names)
    if replicas == 1:
        mesh = mesh["shards"]
    for name in SHARDED:
        for sharing in sharings(world):
            model: Any = wide()
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            options = {"factors": 2, "inverses": 4, "early": False, "sharing": sharing, "lr": 1e-3}
            optimizer = make_optimizer(METHODS[name], model, damping=0.1, **options)
            logs = []
            for step in range(3):
                log.clear()
                x, y = data_of("wide", 100 * step + rank)
                functional.cross_entropy(model(x), y).backward()
                with Received() as received:
                    optimizer.step()
                whole = received.sizes.get("all_gather_into_tensor", 0) / 8 / cut
                logs.append(sent([*log, ("all_gather", [int(whole)])]))
                gradients = [p.grad for p in model.parameters()]
                optimizer.zero_grad()
            tensors = [t for state in optimizer.state.values() for t in state.values()]
            steps = [t for t in tensors if is_sharded(t)]
            local = sum(own_shard(t).numel() for t in (*model.parameters(), *gradients, *steps))
            estimates = optimizer.preconditioner.curvature.estimates.values()
            found[name, sharing] = {"logs": logs[::-1], "kept": held(estimates), "model": 8 * local}
    return found


@pytest.fixture(scope="module", params=[1, 2])
def trained_in_shards(request: pytest.FixtureRequest) -> tuple[int, list[Any]]:
    return request.param, processes.run(training_in_shards, request.param, world=4)


@pytest.mark.slow
@processes.shards_on_cpus
@pytest.mark.parametrize("sharing", sharings(4))
@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_kept_and_sent_as_planned(
    trained_in_shards: Any, name: str, sharing: Any
) -> None:
    replicas, found_in = trained_in_shards
    world = len(found_in)
    options = Options(
        name, (world,), SAMPLES, factors=2, inverses=4, shards=True, replicas=replicas
    )
    (work,) = (one for one in plan_model(wide(), options).works if one.sharing == sharing)
    step = (work.whole_gradients, work.natural_gradients)
    update = (*step, work.sums, work.rows, work.column_sums, work.column_rows)
    factorisation = (*update, work.inverses, work.parameters)
    assert sum(m.per_step for m in factorisation) == work.sent
    assert work.parameters.size == 0 and work.gradients.collective == "reduce_scatter"
    logs = [each[name, sharing]["logs"] for each in found_in]
    for each, messages in zip(zip(*logs, strict=True), (update, step, factorisation), strict=True):
        planned = dict.fromkeys((*COLLECTIVES, "all_to_all"), 0.0)
        for message in (*messages, work.replica_gradients):
            planned[message.collective] += message.size / 8
        # Owners differ, and so do columns of a grid, of which the one that sends most is planned.
        swaps = [log.pop("all_to_all", 0) for log in each]
        most = {**max(each, key=lambda log: sum(log.values())), "all_to_all": max(swaps)}
        for collective, elements in planned.items():
            found = most.get(collective, 0)
            assert found == pytest.approx(elements, rel=0.05, abs=200), (collective, messages)
    for what, bytes_planned in (("kept", work.memory), ("model", work.model)):
        assert max(each[name, sharing][what] for each in found_in) == bytes_planned
    whole = plan_model(wide(), replace(options, shards=False, replicas=1)).works[0]
    assert work.model == pytest.approx(replicas * whole.model / world, rel=0.05)
    parameters = whole.model // 3
    assert whole.owned == parameters
    assert work.owned == 2 * (
        parameters if sharing == "nothing" else work.natural_gradients.size // replicas
    )


# -- the model -------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A norm of another author's, which natgrad knows by trying it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def language_model() -> nn.Module:
    return nn.Sequential(Transformer(), Scaled(11))


def with_values() -> nn.Module:
    """A model that cannot be made without values."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(int(torch.tensor(5.0)), 4), nn.Conv1d(4, 6, 3, groups=2))


def returns_number() -> int:
    return 3


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


@pytest.mark.parametrize("method", METHODS)
def test_without_memory_the_plan_is_the_same(method: str) -> None:
    options = Options(method, (1, 3, 100), samples=4, positions=6, memory=1.0)
    with torch.device("meta"):
        assert {p.device.type for p in language_model().parameters()} == {"meta"}
    plan = plan_factory("tests.experiments.test_plan:language_model", options)
    assert plan == plan_model(language_model(), options)
    assert plan.parts == len(natgrad.KFAC(language_model()).preconditioner.curvature.parts)


@pytest.mark.parametrize(
    ("network", "parameters", "parts"),
    [("resnet50", 25_557_032, 107), ("gpt2", 124_439_808, 75), ("llama", 6_738_415_616, 291)],
)
def test_large_networks_are_planned_for(network: str, parameters: int, parts: int) -> None:
    if network != "resnet50":
        pytest.importorskip("transformers")
    options = Options(ranks=(8, 1024), samples=2, positions=64)
    plan = plan_factory(f"tests.distributed.planned_networks:{network}", options)
    assert plan.parameters == plan.covered == parameters and plan.parts == parts
    # The fewer keep a layer, the less each keeps.
    for ranks in options.ranks:
        kept = [work.memory for work in plan.works if work.ranks == ranks]
        assert kept[:-1] == sorted(kept[:-1], reverse=True) and kept[0] == kept[-1] > kept[-2] > 0
    assert all(work.moved > 0 for work in plan.works)


def test_a_model_that_needs_values_is_made_with_values() -> None:
    plan = plan_factory("tests.experiments.test_plan:with_values", Options())
    assert plan == plan_model(with_values(), Options()) and plan.parts == 2


def test_rings_move_what_they_move() -> None:
    for ranks in (1, 2, 5):
        moved = (ranks - 1) / ranks * 60
        assert Message("all_reduce", 120, 2, ranks).moved == pytest.approx(2 * moved)
        assert Message("broadcast", 120, 2, ranks).moved == pytest.approx(moved)
        assert Message("reduce", 120, 2, ranks).moved == pytest.approx(moved)
        for collective in ("all_gather", "gather"):
            assert Message(collective, 120, 2, ranks).moved == pytest.approx(60 * (ranks - 1))


def test_one_process_sends_nothing_and_keeps_all() -> None:
    plan = plan_model(wide(), Options(ranks=(1, 3)))
    alone, shared = plan.works[:3], plan.works[3:]
    assert all(work.sent == work.moved == work.communication == 0 for work in alone)
    assert len({(work.memory, work.seconds) for work in alone}) == 1
    assert alone[0].gradients.size == 0 < shared[0].gradients.size == 8 * plan.parameters
    assert alone[0].memory == natgrad.KFAC(wide()).summary().memory
    assert shared[1].memory < shared[0].memory == shared[2].memory == alone[0].memory
    # Each of three processes has a layer of its own.
    costs = natgrad.KFAC(wide()).preconditioner.curvature
    assert [len(names) for names in costs.balanced(list(costs.parts), 3)] == [1, 1, 1]
    assert shared[0].factorisation < shared[2].factorisation == alone[0].factorisation


def test_work_is_that_of_the_layers() -> None:
    options = Options("kfac", (2,), samples=10, factors=2, inverses=4, bandwidth=1.0, throughput=3)
    work = plan_model(wide(), options).works[0]
    sides = [(a + 1, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
    cubes = [a**3 + b**3 for a, b in sides]
    assert work.factorisation == 2 * max(cubes[1], cubes[0] + cubes[2]) / 4
    assert work.statistics == pytest.approx(2 * 10 * sum(a**2 + b**2 for a, b in sides) / 2)
    assert work.preconditioning == 2 * sum(a * b * (a + b) for a, b in sides)
    flops = work.factorisation + work.statistics + work.preconditioning
    assert work.computation == pytest.approx(flops / 3e12)
    assert work.communication == pytest.approx(work.moved / 1e9)
    assert work.seconds == work.computation + work.communication


def test_rows_of_all_are_worked_on_wherever_they_are_kept() -> None:
    one, many = plan_model(wide(), Options("ekfac", (1, 3))).works[2::3]
    parameters = sum(p.numel() for p in wide().parameters())
    assert many.statistics - one.statistics == pytest.approx(2 * 2 * 128 * parameters / 10)
    # Of shared weights moments are those of 16 samples, however many processes there are.
    options = Options("ekfac", (1, 4), positions=5)
    works = plan_model(wide(), options).works
    one, many = works[2], works[-1]
    assert many.statistics <= one.statistics and many.rows.size * 4 == pytest.approx(
        16 * 5 * 8 * sum(a + b for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
    )


def test_the_fastest_mode_that_fits_is_taken() -> None:
    plan = plan_model(wide(), Options(ranks=(3, 40)))
    for ranks in (3, 40):
        fastest = min((w for w in plan.works if w.ranks == ranks), key=lambda w: w.seconds)
        assert best(plan, ranks) == fastest
    least = min(work.memory for work in plan.works) / 2**30
    tight = replace(plan, options=replace(plan.options, memory=1.01 * least))
    assert {best(tight, ranks).sharing for ranks in (3, 40)} == {"memory"}  # type: ignore[union-attr]
    assert "sharing='memory' with 3 and 40 ranks" in advice(tight)
    none = replace(plan, options=replace(plan.options, memory=0.5 * least))
    assert best(none, 3) is None
    assert advice(none).startswith("No mode keeps within") and advice(none).count(".") >= 1


def test_structures_that_do_not_share_tell_nothing() -> None:
    curvature = natgrad.DiagonalNGD(wide()).preconditioner.curvature
    (part, *_) = curvature.parts.values()
    with pytest.raises(NotImplementedError, match="'diagonal' does not tell"):
        curvature.structure.elements(part, natgrad.curvature.cost.Workload(1, 1))


@pytest.mark.parametrize("factored_damping", [True, False])
def test_elements_are_those_of_estimates(factored_damping: bool) -> None:
    structure = KroneckerFactors(factored_damping=factored_damping, max_factor_size=75)
    model = nn.Sequential(nn.Embedding(9, 60), *wide().float())
    optimizer = make_optimizer(natgrad.KFAC, model, structure=structure, damping=0.1)
    functional.cross_entropy(model(torch.arange(6)), torch.arange(6) % 5).backward()
    optimizer.step()
    curvature = optimizer.preconditioner.curvature
    workload = natgrad.curvature.cost.Workload(6, 1)
    for name, part in curvature.parts.items():
        estimate, planned = curvature.estimates[name], structure.elements(part, workload)
        assert 4 * planned.kept == held([estimate])


# -- the command -----------------------------------------------------------------------------------

MODEL = "tests.experiments.test_plan:language_model"


def test_the_command_prints_tables_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", MODEL, "--ranks=1,8,1024", "--method=ekfac", "--positions=6"]) == 0
    printed = capsys.readouterr().out
    for text in ("ekfac", "1,024", "inverses", "memory", "nothing", "GFLOP", "25 GB/s", "Take"):
        assert text in printed
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_the_command_plans_for_shards(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", MODEL, "--ranks=1,8", "--shards"]) == 0
    printed = capsys.readouterr().out
    assert "owned" in printed and "model" in printed and "parameters  " not in printed
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_a_mesh_stands_for_ranks_and_replicas(capsys: pytest.CaptureFixture[str]) -> None:
    for mesh, options in (("4x8", ["--ranks=32", "--replicas=4"]), ("8", ["--ranks=8"])):
        assert run(["plan", MODEL, "--json", f"--mesh={mesh}"]) == 0
        found = capsys.readouterr().out
        assert run(["plan", MODEL, "--json", "--shards", *options]) == 0
        assert found == capsys.readouterr().out


def test_inverses_come_in_rounds_of_a_bounded_size() -> None:
    """Layers of 3, 3, 2 and 1 million entries: 3 + 1 and 3 come first, and then 2."""
    layers = [nn.Linear(a, 2, bias=False) for a in (1732, 1731, 1414, 1000)]
    work = plan_model(nn.Sequential(*layers), Options(ranks=(2,), inverses=1, factors=1)).works[0]
    each = [4 * (layer.in_features**2 + 2**2) for layer in layers]
    assert work.inverses.collective == "all_gather"
    assert work.inverses.size == pytest.approx(each[0] + each[3] + each[2], rel=0.01)


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", MODEL, "--ranks=2,64", "--json", "--memory=1e-6", "--factors=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = Options(ranks=(2, 64), memory=1e-6, factors=3)
    assert found == json.loads(json.dumps(to_dict(plan_model(language_model(), options))))
    assert [(w["ranks"], w["sharing"]) for w in found["works"]] == [
        (ranks, sharing) for ranks in (2, 64) for sharing in sharings(ranks)
    ]
    assert found["best"] == {"2": None, "64": None} and found["options"]["inverses"] == 20
    work = found["works"][0]
    assert work["seconds"] == work["communication"] + work["computation"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MODEL, "--method=cubic"], "must be one of kfac, ekfac"),
        ([MODEL, "--ranks=8,many"], "positive numbers separated by commas"),
        ([MODEL, "--ranks=0"], "positive numbers"),
        ([MODEL, "--ranks=8,-1"], "positive numbers"),
        ([MODEL, "--ranks="], "positive numbers"),
        ([MODEL, "--samples=0"], "at least 1"),
        ([MODEL, "--inverses=0"], "at least 1"),
        ([MODEL, "--replicas=2"], "Replicas are of parameters in shards"),
        ([MODEL, "--shards", "--ranks=8,5", "--replicas=2"], "must divide the ranks"),
        ([MODEL, "--shards", "--replicas=0"], "at least 1"),
        ([MODEL, "--mesh=8by2"], "as 8x128, not '8by2'"),
        ([MODEL, "--mesh=2x2x2"], "as 8x128, not '2x2x2'"),
        ([MODEL, "--mesh=0x4"], "as 8x128, not '0x4'"),
        ([MODEL, "--bandwidth=0"], "bandwidth must be positive"),
        ([MODEL, "--memory=-1"], "memory must be positive"),
        (["tests.experiments.test_plan:returns_number"], "must return a torch.nn.Module"),
        (["tests.experiments.test_plan:absent"], "no attribute 'absent'"),
        (["tests.experiments.test_plan:frozen"], "no trainable parameter"),
        ([], "Missing argument"),
    ],
)
def test_the_command_refuses_wrong_input(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, run(["plan", *arguments]))


def test_ranks_are_numbers() -> None:
    assert parse_ranks("1, 8,64") == (1, 8, 64)
    with pytest.raises(PlanError, match="positive"):
        Options(ranks=())

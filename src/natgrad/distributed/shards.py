"""Parameters in shards, of FSDP2's ``fully_shard`` or in tensor parallelism: whole where looked at.

A shard is never preconditioned as a matrix. Where processes divide the work, the gradient of a
layer becomes whole in the process that owns the layer, and shards of its natural gradient come
back; with other structures it becomes whole in all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.distributed.exchange import swapped

#: Why tensor parallelism is refused beside other processes.
BESIDE_REPLICAS = (
    "the model is in tensor parallelism and in DistributedDataParallel, or in a process_group= "
    "with processes of the same samples, and natgrad takes it beside fully_shard (FSDP2) over "
    "another dimension of the mesh: use that, or name as process_group= those that have the same "
    "pieces and other samples"
)


def is_cut(placement: Any) -> bool:
    """Return whether a tensor is cut along a dimension of its mesh, by stripes, too."""
    return not (placement.is_replicate() or placement.is_partial())


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is kept in shards."""
    return hasattr(tensor, "device_mesh")


def mesh_groups(model: nn.Module) -> tuple[Any, Any]:
    """Return the processes that each have samples of their own, and all that hold some piece.

    They differ where layers of shards are in tensor parallelism, too, as processes that have the
    pieces of a layer have the same samples. Those that a forward pass has left whole are sharded
    again, as they tell nothing.

    Returns:
        Both groups; None for the first in tensor parallelism alone, for both without shards.

    Raises:
        ValueError: If parameters are sharded otherwise than by FSDP2 over one mesh: of one
            dimension, or of two, in replicas of shards, that hold all processes; or than linear
            layers are in tensor parallelism.
    """
    if any(hasattr(parameter, "_st_info") for parameter in model.parameters()):
        raise ValueError(BESIDE_REPLICAS)  # DistributedDataParallel has put pieces in their place.
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for unit in units:
        unit.reshard()
        for group in _groups(unit):  # In a forward pass the outermost one stays whole.
            if group.is_unsharded:
                group._to_sharded()
    if not any(map(is_sharded, model.parameters())):
        return None, None
    if not units:
        _check_pieces(model, 0)
        return None, None
    held = {p for unit in units for p in unit.parameters()}
    mesh, *others = {group.mesh_info.mesh for unit in units for group in _groups(unit)}
    world, everyone = torch.distributed.get_world_size(), torch.distributed.group.WORLD
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            cut: Any = parameter
            kinds = [is_cut(one) for one in cut.placements[: mesh.ndim]]
            beyond = cut.device_mesh.ndim - mesh.ndim
            of_all = cut.device_mesh.size() == world
            known = len(kinds) == 1 and (of_all or not beyond)  # Cut, or a replica in each.
            known = known or (kinds == [False, True] and of_all)
            if parameter not in held or others or not known:
                raise ValueError(
                    f"parameter {name!r} is spread over {cut.device_mesh} as {cut.placements}, and "
                    "natgrad takes whole parameters, or those that fully_shard (FSDP2) has sharded "
                    "over one mesh, in one dimension or in replicas, beside which there may be one "
                    "of tensor parallelism: shard the whole model with fully_shard, over one mesh"
                )
    pieces = _check_pieces(model, mesh.ndim)
    if not pieces:
        group = mesh.get_group() if mesh.ndim == 1 else everyone
        return group, group
    return _group_of(mesh), everyone


@functools.lru_cache(maxsize=64)
def _group_of(mesh: Any) -> Any:
    """Return the group of a mesh of one dimension or two, which all of its processes ask for."""
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def _check_pieces(model: nn.Module, before: int) -> bool:
    """Return whether layers are in tensor parallelism, in one dimension of one mesh at most."""
    meshes = set()
    for name, parameter in model.named_parameters():
        cut: Any = parameter
        if not is_sharded(parameter) or cut.device_mesh.ndim == before:
            continue
        meshes.add(cut.device_mesh)
        if len(meshes) > 1 or cut.device_mesh.ndim > before + 1:
            raise ValueError(
                f"parameter {name!r} is spread over {cut.device_mesh} as {cut.placements}, and in "
                "tensor parallelism natgrad takes one mesh of one dimension: give all layers that, "
                "or shard the model with fully_shard alone"
            )
    return bool(meshes)


def everyone_beside(model: nn.Module, group: Any) -> Any:
    """Return all processes, of which those of a group have other samples than this one.

    The group has the same pieces of a model in tensor parallelism, one process of each mesh.
    """
    cut: Any = next(parameter for parameter in model.parameters() if is_sharded(parameter))
    ranks = set(torch.distributed.get_process_group_ranks(group))
    pieces = set(cut.device_mesh.mesh.flatten().tolist())
    world = torch.distributed.get_world_size()
    if ranks & pieces != {torch.distributed.get_rank()} or len(ranks) * len(pieces) != world:
        raise ValueError(BESIDE_REPLICAS)
    return torch.distributed.group.WORLD


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its shards, in which all processes take part."""
    shards: Any = tensor
    return shards.full_tensor() if is_sharded(tensor) else tensor


def own_shard(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor."""
    shards: Any = tensor
    return shards.to_local() if is_sharded(tensor) else tensor


def shard_count(tensor: Tensor) -> int:
    """Return into how many shards a tensor is cut."""
    cut: Any = tensor
    if not is_sharded(tensor):
        return 1
    sizes = zip(cut.device_mesh.shape, cut.placements, strict=True)
    return math.prod(size for size, placement in sizes if is_cut(placement))


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole value, the same in all processes, in shards like a parameter's."""
    if not is_sharded(parameter) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def in_form_of(value: Tensor, other: Tensor) -> Tensor:
    """Return a value as it is where another of its shape is in shards, else whole."""
    return value if is_sharded(other) else whole(value)


def at_owners(
    values: Mapping[str, Tensor], owners: Mapping[str, int], group: Any
) -> dict[str, Tensor]:
    """Return those values whole that this process owns, by each name's rank in the group.

    Every shard is sent once; of replicas of shards by those that the owner's is made of.
    """
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    sent: list[list[Tensor]] = [[] for _ in range(world)]
    coming: list[list[Tensor]] = [[] for _ in range(world)]
    senders: dict[str, list[int]] = {}
    for name, value in values.items():
        owner, places = owners[name], _places(value, group)
        if places[rank][0] == places[owner][0]:
            sent[owner].append(own_shard(value))
        if owner == rank:
            row = places[rank][0]
            own = {shard: q for q, (replica, shard) in enumerate(places) if replica == row}
            senders[name] = [own[shard] for shard in range(shard_count(value))]
            for q, piece in zip(senders[name], _pieces(_outline(value), value), strict=True):
                coming[q].append(piece)
    found = [iter(each) for each in swapped(sent, coming, _types(values), group)]
    return {
        name: torch.cat([next(found[q]) for q in ranks], _dimension(values[name]))
        for name, ranks in senders.items()
    }


def from_owners(
    wholes: Mapping[str, Tensor], like: Mapping[str, Tensor], owners: Mapping[str, int], group: Any
) -> dict[str, Tensor]:
    """Return values, of which one process each has the whole, in shards like others."""
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    sent: list[list[Tensor]] = [[] for _ in range(world)]
    coming: list[list[Tensor]] = [[] for _ in range(world)]
    for name, value in like.items():
        coming[owners[name]].append(_outline(own_shard(value)))
        if owners[name] == rank:
            pieces = _pieces(wholes[name].to(value.dtype), value)
            for q, (_, shard) in enumerate(_places(value, group)):
                sent[q].append(pieces[shard])
    found = [iter(each) for each in swapped(sent, coming, _types(like), group)]
    return {name: _shard_like(next(found[owners[name]]), value) for name, value in like.items()}


def _outline(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _types(values: Mapping[str, Tensor]) -> list[torch.dtype]:
    """Return the types of values, in the same order everywhere."""
    return sorted({value.dtype for value in values.values()}, key=str)


def _dimension(tensor: Tensor) -> int:
    """Return the dimension along which a tensor is cut."""
    cut: Any = tensor
    placements = cut.placements if is_sharded(tensor) else ()
    return next((one.dim for one in placements if one.is_shard()), 0)


def _pieces(value: Tensor, like: Tensor) -> list[Tensor]:
    """Return the shards of a whole value, cut like another; the last ones may be empty."""
    count, dim = shard_count(like), _dimension(like)
    pieces = list(value.chunk(count, dim)) if value.dim() else [value]
    return pieces + [value.narrow(dim, 0, 0)] * (count - len(pieces))


def _shard_like(shard: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of shards, of which this process has one, cut like another."""
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    cut: Any = like
    return DTensor.from_local(
        shard, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape,
        stride=cut.stride(),
    )  # fmt: skip


def _places(tensor: Tensor, group: Any) -> Sequence[tuple[Any, int]]:
    """Return which replica and which of its shards every process has of a tensor."""
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    cut: Any = tensor
    if not is_sharded(tensor):
        return [(rank, 0) for rank in ranks]
    return _places_in(cut.device_mesh, tuple(cut.placements), ranks)


@functools.lru_cache(maxsize=64)
def _places_in(
    mesh: Any, placements: tuple[Any, ...], ranks: tuple[int, ...]
) -> list[tuple[Any, int]]:
    cut = next((i for i, one in enumerate(placements) if one.is_shard()), len(placements))
    found = []
    for rank in ranks:
        seat = [*(mesh.mesh == rank).nonzero()[0].tolist(), 0]
        found.append((tuple(seat[:cut]), seat[cut]))
    return found


def _groups(unit: Any) -> list[Any]:
    """Return what a sharded module knows of its parameters, which no public method tells."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def reduces_gradients(model: nn.Module) -> bool:
    """Return whether the next backward pass reduces the gradients of parameters in shards."""
    units = [module for module in model.modules() if hasattr(module, "unshard")]
    return all(group.reduce_grads for unit in units for group in _groups(unit))


def left_whole(model: nn.Module) -> list[Any]:
    """Return the sharded modules whose parameters are whole at present, as in a forward pass."""
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    return [unit for unit in units if any(group.is_unsharded for group in _groups(unit))]


@contextmanager
def whole_parameters(model: nn.Module, shards_again: bool = False) -> Iterator[None]:
    """Have a model's parameters whole, and keep them so through backward passes inside.

    Such passes neither reduce gradients nor shard parameters again; where no backward pass follows
    that does, ``shards_again`` does it at the end.
    """
    units: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    before = []
    for unit in units:
        unit.unshard()
        names = ("reduce_grads", "all_reduce_grads", "reshard_after_backward")
        held = [(unit._get_fsdp_state()._state_ctx, "is_last_backward")]
        held += [(group, name) for group in _groups(unit) for name in names]
        before += [(owner, name, getattr(owner, name)) for owner, name in held]
    for owner, name, _ in before:
        setattr(owner, name, False)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
        for unit in units if shards_again else ():
            unit.reshard()

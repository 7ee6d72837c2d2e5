"""Nested values of tensors, summed over the processes of a group or gathered from all of them.

A value is made of dicts, lists and tuples of tensors and plain values, None where there is nothing.
What differs from process to process besides the numbers (how many rows there are, which layers a
batch has reached) need not be known beforehand: *outlines* are compared first, by hashes, and sent
where a combination of them is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

_Kind = TypeVar("_Kind")

#: Hashes of all processes' outlines → the outlines.
Outlines = dict[tuple[int, ...], list[Any]]

#: How many combinations of outlines are remembered.
KNOWN_OUTLINES = 256

#: What is padded to so many times its size is broadcast by each process instead, without padding.
PADDED = 2

#: Largest number of elements that are joined into one message; larger tensors go alone.
BUCKET_ELEMENTS = 2**22


class Triangles(Protocol):
    """Symmetric matrices in less memory."""

    @property
    def shape(self) -> torch.Size:
        """That of the matrices, ``(..., d, d)``."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of their entries."""

    def matrices(self) -> Tensor:
        """Return matrices, right in their lower triangles."""

    @classmethod
    def of(cls, matrices: Tensor) -> Self:
        """Return the triangles of some matrices."""


@dataclass(frozen=True, eq=False)
class Symmetric:
    """Symmetric matrices, right in their lower triangles, of which half is sent.

    Attributes:
        held: ``(..., d, d)``; in whatever less memory they are kept they come back.
    """

    held: Tensor | Triangles

    def packed(self) -> Tensor:
        """Return what is sent."""
        matrices = self.held if isinstance(self.held, Tensor) else self.held.matrices()
        return packed_triangles(matrices)


@dataclass(frozen=True)
class _Slot:
    """What stands for a tensor in an outline, or for symmetric matrices, kept in some form."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    symmetric: bool = False
    form: type[Triangles] | None = None

    @classmethod
    def of(cls, value: Tensor | Symmetric) -> _Slot:
        if isinstance(value, Tensor):
            return cls(tuple(value.shape), value.dtype)
        held = value.held
        form = None if isinstance(held, Tensor) else type(held)
        return cls(tuple(held.shape), held.dtype, True, form)


class Sum:
    """A sum of values over processes, entry by entry, that is under way.

    A process that has None somewhere adds zero. Plain values are those of the first process that
    has some. :class:`Symmetric` matrices come back in the form they had. Nobody waits for messages
    before :meth:`result`, but for the outlines, which are small.

    Args:
        value: The value of this process.
        group: The process group.
        device: Where tensors lie, also on a process that has none.
        known: Outlines seen before in this group, by all of its processes.
        stages: Groups that this process adds up in, one after the other, each with the one that
            has the sum then, by its rank there, or None for all; by default in the group, for all.

    Raises:
        ValueError: If tensors at the same place have different shapes or types.
    """

    def __init__(
        self,
        value: Any,
        group: Any,
        device: torch.device,
        known: Outlines,
        stages: Sequence[tuple[Any, int | None]] | None = None,
    ) -> None:
        self._outline = _merged(_outlines(_outline(value), group, device, known))
        self._stages = list([(group, None)] if stages is None else stages)
        terms = list(_terms(self._outline, value, device))
        self._buckets = _buckets(terms)
        self._shapes = [term.shape for term in terms]
        self._flat: list[Tensor] = []
        self._handles: list[Any] = []
        for bucket in self._buckets:
            self._flat.append(torch.cat([terms[i].reshape(-1) for i in bucket]))
            self._handles += [self._added_up(self._flat[-1], *stage) for stage in self._stages[:1]]

    @staticmethod
    def _added_up(flat: Tensor, group: Any, owner: int | None) -> Any:
        """Return the handle of a message that adds up in place."""
        if owner is None:
            return torch.distributed.all_reduce(flat, group=group, async_op=True)
        to = _global(owner, group)
        return torch.distributed.reduce(flat, to, group=group, async_op=True)

    def wait(self) -> None:
        """Wait for the messages that are under way."""
        while self._handles:
            self._handles.pop(0).wait()

    def result(self) -> Any:
        """Wait for the sum and return it, once; who is not to have it has a part of it."""
        for stage in [*self._stages[1:], None]:
            self.wait()
            if stage is not None:
                self._handles = [self._added_up(flat, *stage) for flat in self._flat]
        return _filled(self._outline, self._pieces(), _from_sent)

    def _pieces(self) -> Iterator[Tensor]:
        """Yield what has come, in order; messages are let go of with their last piece."""
        pieces: dict[int, Tensor] = {}
        messages = iter(zip(self._buckets, range(len(self._flat)), strict=True))
        for i, shape in enumerate(self._shapes):
            while i not in pieces:
                bucket, number = next(messages)
                flat, self._flat[number] = self._flat[number], torch.empty(0)
                split = flat.split([self._shapes[j].numel() for j in bucket])
                pieces |= zip(bucket, split, strict=True)
                del flat, split
            piece = pieces.pop(i)
            # A small one would keep all of its message.
            whole = piece.untyped_storage().nbytes() == piece.nbytes
            yield (piece if whole else piece.clone()).reshape(shape)


def gathered(
    value: Any,
    group: Any,
    device: torch.device,
    known: Outlines,
    owner: int | None = None,
    like: Sequence[Any] | None = None,
) -> list[Any]:
    """Return the values of all processes, in the order of their ranks.

    Args:
        value: The value of this process.
        group: The process group.
        device: Where tensors lie, also on a process that has none.
        known: Outlines seen before in this group, by all of its processes.
        owner: The one process that wants them, by its rank in the group; all by default. Others
            have none.
        like: What all of them have, as tensors on the meta device, where everybody knows that;
            otherwise outlines are compared first.
    """
    if like is None:
        outlines = _outlines(_outline(value), group, device, known)
    else:
        outlines = [_outline(one) for one in like]
    slots = [list(_found(_Slot, outline)) for outline in outlines]
    own = list(_found(Tensor, value))
    here = owner is None or owner == torch.distributed.get_rank(group)
    dtypes = {slot.dtype: None for one in slots for slot in one}  # In the same order everywhere.
    received: dict[torch.dtype, list[Tensor]] = {}
    for dtype in dtypes:
        totals = [sum(prod(slot.shape) for slot in one if slot.dtype == dtype) for one in slots]
        longest = max(totals)
        mine = [tensor.reshape(-1) for tensor in own if tensor.dtype == dtype]
        flat = torch.cat([*mine, torch.zeros(0, dtype=dtype, device=device)])
        if owner is not None or not is_padded(totals):
            flat = torch.nn.functional.pad(flat, (0, longest - len(flat)))
        found = [torch.empty_like(flat) for _ in outlines] if here else []
        if owner is None and is_padded(totals):
            found = _broadcast(flat, totals, group)
        elif owner is None:
            torch.distributed.all_gather(found, flat, group=group)
        else:
            torch.distributed.gather(flat, found or None, _global(owner, group), group=group)
        received[dtype] = found
    if not here:
        return []
    return [
        _cut(outline, {dtype: found[rank] for dtype, found in received.items()})
        for rank, outline in enumerate(outlines)
    ]


def passed_round(
    value: Any, group: Any, device: torch.device, known: Outlines, steps: int
) -> Iterator[Any]:
    """Yield the values of the processes before this one in a ring, the nearest first.

    Every process hands on what it was handed. While one value is looked at the next arrives, so
    that no process ever holds more than two that are not its own; all must take all of them.

    Args:
        value: The value of this process.
        group: The process group.
        device: Where tensors lie, also on a process that has none.
        known: Outlines seen before in this group, by all of its processes.
        steps: How many are wanted, less than there are processes.
    """
    outlines = _outlines(_outline(value), group, device, known)
    rank, world = torch.distributed.get_rank(group), len(outlines)
    after, before = (_global((rank + step) % world, group) for step in (1, -1))
    dtypes = {slot.dtype: None for one in outlines for slot in _found(_Slot, one)}
    held = {
        dtype: torch.cat(
            [t.reshape(-1) for t in _found(Tensor, value) if t.dtype == dtype]
            or [torch.empty(0, dtype=dtype, device=device)]
        )
        for dtype in dtypes
    }
    del value  # It may have been made for this.

    def hand_on(step: int) -> tuple[dict[torch.dtype, Tensor], list[Any]]:
        """Send what is held, and return where the value of ``step`` places before arrives."""
        slots = list(_found(_Slot, outlines[(rank - step) % world]))
        arriving, messages = {}, []
        for dtype, mine in held.items():
            size = sum(prod(slot.shape) for slot in slots if slot.dtype == dtype)
            arriving[dtype] = mine.new_empty(size)
            for number, operation, tensor, other in (
                (mine.numel(), torch.distributed.isend, mine, after),
                (size, torch.distributed.irecv, arriving[dtype], before),
            ):
                if number:
                    messages.append(torch.distributed.P2POp(operation, tensor, other, group))
        return arriving, torch.distributed.batch_isend_irecv(messages) if messages else []

    arriving, requests = hand_on(1) if steps else ({}, [])
    for step in range(1, steps + 1):
        while requests:
            requests.pop().wait()  # And with it goes what was sent.
        held = arriving
        if step < steps:
            arriving, requests = hand_on(step + 1)
        yield _cut(outlines[(rank - step) % world], held)


def swapped(
    sent: Sequence[Sequence[Tensor]],
    coming: Sequence[Sequence[Tensor]],
    dtypes: Sequence[torch.dtype],
    group: Any,
) -> list[list[Tensor]]:
    """Return the tensors that each process has sent to this one, in one message a type.

    Those to come are told as tensors on the meta device, and all types that any process sends in
    the same order everywhere.
    """
    found = {}
    device = next((t.device for each in sent for t in each), torch.device("cpu"))
    for dtype in dtypes:
        own = [[t.reshape(-1) for t in each if t.dtype == dtype] for each in sent]
        sizes = [[t.numel() for t in each if t.dtype == dtype] for each in coming]
        nothing = torch.empty(0, dtype=dtype, device=device)
        counts = [sum(map(len, each)) for each in own]
        flat = torch.cat([nothing, *(t for each in own for t in each)])
        del own
        arrived = flat.new_empty(sum(map(sum, sizes)))
        torch.distributed.all_to_all_single(
            arrived, flat, [sum(each) for each in sizes], counts, group=group
        )
        found[dtype] = iter(arrived.split([size for each in sizes for size in each]))
    return [[next(found[one.dtype]).view(one.shape) for one in each] for each in coming]


def _cut(outline: Any, flat: dict[torch.dtype, Tensor]) -> Any:
    """Return the value of an outline whose tensors lie end to end, type by type."""
    slots = list(_found(_Slot, outline))
    sizes = {d: [prod(slot.shape) for slot in slots if slot.dtype == d] for d in flat}
    pieces = {d: iter(one[: sum(sizes[d])].split(sizes[d])) for d, one in flat.items()}
    return _filled(outline, _in_order(slots, pieces), _as_shaped)


def laid_end_to_end(own: Tensor, lengths: Sequence[int], group: Any) -> Tensor:
    """Return the rows ``(n_r, ...)`` of all processes, in the order of ranks."""
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    found = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(found, padded, group=group)
    return torch.cat([one[:number] for one, number in zip(found, lengths, strict=True)])


def is_padded(sizes: Sequence[int]) -> bool:
    """Return whether gathering pieces of such sizes would pad them too much."""
    return len(sizes) * max(sizes) > PADDED * sum(sizes)


def _broadcast(own: Tensor, sizes: Sequence[int], group: Any) -> list[Tensor]:
    """Return the pieces of all processes, each sent by the one that has it."""
    rank, found = torch.distributed.get_rank(group), []
    for sender, size in enumerate(sizes):
        piece = own[:size] if sender == rank else own.new_empty(size)
        if size:
            torch.distributed.broadcast(piece, _global(sender, group), group=group)
        found.append(piece)
    return found


def taken_apart(value: Any) -> tuple[Any, list[Tensor]]:
    """Return the outline of a value, and its tensors as a sum sends them."""
    outline = _outline(value)
    return outline, list(_terms(outline, value, torch.device("cpu")))


def put_together(outline: Any, sent: Sequence[Tensor]) -> Any:
    """Return the value that :func:`taken_apart` took apart, with other numbers."""
    return _filled(outline, iter(sent), _from_sent)


def _global(rank: int, group: Any) -> int:
    """Return the rank in the world of a process of a group."""
    return rank if group is None else torch.distributed.get_global_rank(group, rank)


# Outlines.


def _outline(value: Any) -> Any:
    if isinstance(value, (Tensor, Symmetric)):
        return _Slot.of(value)
    if isinstance(value, dict):
        return {key: _outline(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_outline(item) for item in value]
    return value


def _outlines(own: Any, group: Any, device: torch.device, known: Outlines) -> list[Any]:
    """Return the outlines of all processes."""
    digest = hashlib.blake2b(repr(own).encode(), digest_size=7).digest()
    mine = torch.tensor([int.from_bytes(digest, "big")], device=device)
    world = torch.distributed.get_world_size(group)
    found = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(found, mine, group=group)
    hashes = tuple(torch.cat(found).tolist())
    if len(set(hashes)) == 1:
        return [own] * world
    if hashes not in known:
        if len(known) >= KNOWN_OUTLINES:
            known.clear()
        known[hashes] = [None] * world
        torch.distributed.all_gather_object(known[hashes], own, group=group)
    return known[hashes]


def _merged(outlines: Sequence[Any]) -> Any:
    """Return the outline of a sum."""
    present = [one for one in outlines if one is not None]
    if not present:
        return None
    first = present[0]
    if isinstance(first, _Slot):
        if any(one != first for one in present):
            raise ValueError(
                f"processes hold tensors of different shapes or types in the same place: {present}"
            )
        return first
    if isinstance(first, dict):
        keys = {key: None for one in present for key in one}
        return {key: _merged([one.get(key) for one in present]) for key in keys}
    if isinstance(first, list):
        return [_merged(items) for items in zip(*present, strict=True)]
    return first


def _found(kind: type[_Kind], value: Any) -> Iterator[_Kind]:
    """Yield the tensors of a nested value, or the slots of an outline."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _found(kind, item)


def _filled(outline: Any, tensors: Iterator[Tensor], read: Callable[[_Slot, Tensor], Any]) -> Any:
    """Return a value of an outline, with tensors in the order of its slots."""
    if isinstance(outline, _Slot):
        return read(outline, next(tensors))
    if isinstance(outline, dict):
        return {key: _filled(item, tensors, read) for key, item in outline.items()}
    if isinstance(outline, list):
        return [_filled(item, tensors, read) for item in outline]
    return outline


# Tensors.


def _terms(outline: Any, value: Any, device: torch.device) -> Iterator[Tensor]:
    """Yield what a process adds to every slot of a sum."""
    if isinstance(outline, _Slot):
        if value is None:
            value = torch.zeros(outline.shape, dtype=outline.dtype, device=device)
            value = Symmetric(value) if outline.symmetric else value
        yield value.packed() if isinstance(value, Symmetric) else value
    elif isinstance(outline, dict):
        for key, item in outline.items():
            yield from _terms(item, None if value is None else value.get(key), device)
    elif isinstance(outline, list):
        for i, item in enumerate(outline):
            yield from _terms(item, None if value is None else value[i], device)


def _from_sent(slot: _Slot, sent: Tensor) -> Tensor | Triangles:
    if not slot.symmetric:
        return sent
    matrices = unpacked_triangles(sent, slot.shape[-1])
    return matrices if slot.form is None else slot.form.of(matrices)


def _as_shaped(slot: _Slot, flat: Tensor) -> Tensor:
    return flat.reshape(slot.shape)


def _in_order(
    slots: Sequence[_Slot], found: dict[torch.dtype, Iterator[Tensor]]
) -> Iterator[Tensor]:
    for slot in slots:
        yield next(found[slot.dtype])


def _buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of tensors that make one message each."""
    buckets: list[list[int]] = []
    open_ones: dict[torch.dtype, tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        members, size = open_ones.get(tensor.dtype, ([], 0))
        if not members or size + tensor.numel() > BUCKET_ELEMENTS:
            members, size = [], 0
            buckets.append(members)
        members.append(i)
        open_ones[tensor.dtype] = members, size + tensor.numel()
    return buckets


def packed_triangles(matrices: Tensor) -> Tensor:
    """Return the lower triangles of ``(..., d, d)``, ``(..., 2m + 1, m)`` with m = ⌈d/2⌉.

    It is LAPACK's rectangular full packed format: the triangle of the last m rows and columns,
    turned over, fills the corner that the first m columns leave empty. An odd d gets a row and a
    column of zeros in front.
    """
    d = matrices.shape[-1]
    if d % 2:
        matrices, d = torch.nn.functional.pad(matrices, (1, 0, 1, 0)), d + 1
    m = d // 2
    packed = matrices.new_zeros(*matrices.shape[:-2], d + 1, m)
    packed[..., 1:, :] = matrices[..., :m].tril()
    packed[..., :m, :] += matrices[..., m:, m:].tril().mT
    return packed


def unpacked_triangles(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric matrices ``(..., d, d)`` of :func:`packed_triangles`."""
    m = packed.shape[-1]
    lower = packed.new_zeros(*packed.shape[:-2], 2 * m, 2 * m)
    lower[..., :m] = packed[..., 1:, :].tril()
    lower[..., m:, m:] = packed[..., :m, :].triu().mT
    whole = lower + lower.tril(-1).mT
    return whole[..., 2 * m - d :, 2 * m - d :]

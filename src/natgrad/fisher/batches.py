"""What data are: a pair of inputs and targets, or an iterable of such pairs, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

Batch = tuple[Any, Any]


def batches_of(data: Any) -> Iterator[Batch]:
    """Iterate over the batches of a pair (inputs, targets) or an iterable; else a ValueError."""
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    if pair and (data[1] is None or isinstance(data[1], (Tensor, Mapping))):
        yield data[0], data[1]
        return
    if pair and isinstance(data[0], Tensor):
        raise ValueError(
            "the targets of a pair (inputs, targets) must be a tensor, a mapping of tensors or "
            f"None, got {type(data[1]).__name__}: pass torch.as_tensor(targets)"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError(
            f"data is a {type(data).__name__}, which yields samples: pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...), or batch_size=None if its items "
            "are batches"
        )
    for batch in data:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ValueError(
                "data must be a pair (inputs, targets) or an iterable of such pairs, got a batch "
                f"of type {type(batch).__name__}{length}: bring batches to pairs first, as in "
                "[((a, b), y) for a, b, y in loader] or "
                "[({'x': batch['x']}, batch['y']) for batch in loader]"
            )
        yield batch[0], batch[1]


def batches_with_samples(data: Any) -> Iterator[Batch]:
    """Iterate over those batches that have samples; a ValueError if data are no such pairs."""
    for inputs, target in batches_of(data):
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        tensors = [inputs] if isinstance(inputs, Tensor) else values
        lengths = [len(one) for one in tensors if isinstance(one, Tensor) and one.dim()]
        if any(lengths) or not lengths:
            yield inputs, target


def check_reiterable(data: Any, name: str = "data") -> None:
    """Raise a ValueError for data that can be read only once."""
    if isinstance(data, Iterator) and iter(data) is data:
        raise ValueError(
            f"{name} must be re-iterable, as a list or a data loader: it is read more than once"
        )


def check_fixed_order(data: Any, name: str = "data") -> None:
    """Raise a ValueError for data that come in another order, or not at all, when read again."""
    check_reiterable(data, name)
    if isinstance(getattr(data, "dataset", None), IterableDataset):
        return
    sampler = getattr(data, "batch_sampler", None) or getattr(data, "sampler", None)
    within = sampler.sampler if type(sampler) is BatchSampler else sampler
    if within is None or isinstance(within, SequentialSampler):
        return
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    if isinstance(within, random) or _changes(within):
        raise ValueError(
            f"{name} is a data loader that shuffles, so that nobody knows which sample a result is "
            "about: give one with shuffle=False"
        )


def _changes(sampler: Any) -> bool:
    """Return whether a sampler gives other indices when it is read again."""
    with torch.random.fork_rng(devices=[]):
        orders = [[str(index) for index in sampler] for _ in range(2)]
    return orders[0] != orders[1]

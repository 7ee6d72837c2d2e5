"""The data of a comparison as its methods see them: the same batches in the same order for all."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from natgrad.capture.evaluation import count_samples, tensors_of
from natgrad.experiments.data import Dataset
from natgrad.experiments.factories import FactoryError, find, located, make
from natgrad.experiments.objectives import Encoding
from natgrad.experiments.random_state import RandomStream, reproducible

Batch = tuple[Any, Any]
"""Inputs, as a model is called with (a tensor, a tuple, or a dict of them), and targets."""

_CHUNK = 2000  # samples of a built-in data set that are evaluated at a time
_END = object()  # what a loader yields instead of a batch when it has none left
_UNKNOWN_LENGTH = 100  # batches that count as an epoch where the loader does not say


class Batches(ABC):
    """Training and held-out data in batches: all samples, if `whole`, or so many an `epoch`."""

    whole: bool
    epoch: int

    @abstractmethod
    def training(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end; the same for the same seed."""

    @abstractmethod
    def measured(self) -> Iterable[Batch]:
        """Return the batches on which the training loss is measured."""

    @abstractmethod
    def held_out(self) -> Iterable[Batch]:
        """Return the batches on which the test loss is measured; none if there are none."""


class TensorBatches(Batches):
    """Batches of a data set in memory, reshuffled every epoch; of all samples for size None."""

    def __init__(self, data: Dataset, encode: Encoding, batch_size: int | None) -> None:
        self._train = data.train_inputs, encode(data.train_labels, data.classes)
        self._test = data.test_inputs, encode(data.test_labels, data.classes)
        self.whole: bool = batch_size is None
        samples = len(data.train_labels)
        self.batch_size: int = samples if batch_size is None else min(batch_size, samples)
        self.epoch: int = -(-samples // self.batch_size)

    def training(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end; the same for the same seed."""
        inputs, targets = self._train
        generator = torch.Generator().manual_seed(seed)
        while self.whole:
            yield self._train
        while True:
            for batch in torch.randperm(len(inputs), generator=generator).split(self.batch_size):
                yield inputs[batch], targets[batch]

    def measured(self) -> Iterable[Batch]:
        """Return the whole training set, in chunks."""
        return zip(*(part.split(_CHUNK) for part in self._train), strict=True)

    def held_out(self) -> Iterable[Batch]:
        """Return the whole test set, in chunks."""
        return zip(*(part.split(_CHUNK) for part in self._test), strict=True)

    def first(self, samples: int) -> Batch:
        """Return so many samples of the training set."""
        inputs, targets = self._train
        return inputs[:samples], targets[:samples]


class LoaderBatches(Batches):
    """Batches of a user's loader, read again and again, on a device and in a floating-point type.

    ``package.module:loader`` is a function without arguments (or an iterable as it is) that gives
    an iterable of batches, or a tuple of two: training and held-out. A batch is a pair of inputs
    and targets, or a dict of keyword arguments of the model with ``labels`` among them. Two tensors
    stand for one batch. Losses are measured on the first batches that hold `samples`, drawn with
    `seed`.

    Raises `FactoryError` if it cannot be imported or called, or gives something else.
    """

    whole = False

    def __init__(
        self,
        specification: str,
        device: torch.device,
        dtype: torch.dtype | None = None,
        samples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.specification: str = specification
        self._device, self._dtype, self._source = device, dtype, find(specification)
        with reproducible(seed):
            self._train, held_out = self._make()
        self._generators = [(generator, generator.get_state()) for generator in self._own()]
        self.epoch: int = max(1, operator.length_hint(self._train, _UNKNOWN_LENGTH))
        self._measured, whole = _first(self._passes(seed), samples)
        if whole:
            self.epoch = len(self._measured)
        with reproducible(seed):
            self._held_out, _ = _first(map(self._checked, held_out), samples)

    def training(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end; the same for the same seed.

        What the loader draws at random comes from a stream apart, whatever the models draw.
        """
        return self._passes(seed, endless=True)

    def measured(self) -> Iterable[Batch]:
        """Return the batches that were drawn first, kept for this."""
        return self._measured

    def held_out(self) -> Iterable[Batch]:
        """Return the first held-out batches; none if the loader gives no such."""
        return self._held_out

    def describe(self) -> dict[str, Any]:
        """Return what is known of the data, in JSON values; samples are those measured."""
        inputs = self._measured[0][0]
        shapes = [list(one.shape[1:]) for one in tensors_of(inputs)]
        return {
            "name": self.specification,
            "title": self.specification,
            "train_samples": sum(count_samples(inputs) for inputs, _ in self._measured),
            "test_samples": sum(count_samples(inputs) for inputs, _ in self._held_out),
            "input_shape": shapes[0],
        }

    def _make(self) -> tuple[Iterable[Any], Iterable[Any]]:
        """Return the training and the held-out part of what the user's function gives."""
        made = self._source
        if callable(made):
            made = make(self.specification, made)
        is_pair = isinstance(made, tuple) and len(made) == 2 and not isinstance(made[0], Tensor)
        train, held_out = made if is_pair else (made, ())
        return self._as_batches(train), self._as_batches(held_out)

    def _as_batches(self, part: Any) -> Iterable[Any]:
        if isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], Tensor):
            return [part]
        streams = isinstance(part, torch.utils.data.IterableDataset)
        if isinstance(part, torch.utils.data.Dataset) and not streams:
            raise FactoryError(
                f"{self.specification} gives a Dataset, which yields samples: "
                "give torch.utils.data.DataLoader(dataset, batch_size=..., shuffle=True)."
            )
        if isinstance(part, (str, Tensor, Mapping)) or not isinstance(part, Iterable):
            raise FactoryError(
                f"{self.specification} gives {type(part).__name__}, but must give an iterable of "
                "batches (input, target), or a tuple of two such, training and held-out."
            )
        return part

    def _again(self) -> Iterator[Any]:
        """Begin anew, with a new iterable if the last one can be read only once."""
        if isinstance(self._train, Iterator):
            if not callable(self._source):
                raise FactoryError(
                    f"{self.specification} can be read only once: name a function that makes it."
                )
            self._train = self._make()[0]
        return iter(self._train)

    def _own(self) -> list[torch.Generator]:
        """Return the random generators that the loader brings along."""
        holders = (self._train, getattr(self._train, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        unique = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return list(unique.values())

    def _passes(self, seed: int, endless: bool = False) -> Iterator[Batch]:
        """Yield the batches of one pass over the loader, or of one after the other."""
        for generator, state in self._generators:
            generator.set_state(state)
            if seed:
                generator.manual_seed(generator.initial_seed() + seed)
        stream = RandomStream(seed)
        while True:
            try:
                iterator, empty = stream.run(self._again), True
                following = functools.partial(next, iterator, _END)
                while (batch := stream.run(following)) is not _END:
                    empty = False
                    yield self._checked(batch)
            except FactoryError:
                raise
            except Exception as error:  # a user's loader may raise anything
                raise FactoryError(f"{self.specification} fails: {located(error)}.") from error
            if empty:
                raise FactoryError(f"{self.specification} gives no batches.")
            if not endless:
                return

    def _checked(self, batch: Any) -> Batch:
        """Return a batch as a pair, on the device."""
        if isinstance(batch, Mapping):
            pair: Batch = (dict(batch), batch.get("labels"))
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, targets = batch
            pair = (tuple(inputs) if isinstance(inputs, list) else inputs, targets)
        else:
            raise FactoryError(
                f"{self.specification} yields {_shown(batch)}, but must yield pairs "
                "(input, target), or dicts of the model's arguments with labels among them."
            )
        try:
            count_samples(pair[0])
        except (ValueError, TypeError, AttributeError):
            raise FactoryError(
                f"{self.specification} yields inputs {_shown(pair[0])}, but they must be tensors "
                "with one first dimension, the samples of a batch."
            ) from None
        moved: Batch = self._moved(pair)
        return moved

    def _moved(self, value: Any) -> Any:
        """Return a value with all its tensors on the device."""
        if isinstance(value, Tensor):
            return value.to(self._device, self._dtype if value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return {key: self._moved(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self._moved(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


def _first(batches: Iterator[Batch], samples: int) -> tuple[list[Batch], bool]:
    """Return the first batches with so many samples, and whether these are all there are."""
    found: list[Batch] = []
    count = 0
    for batch in batches:
        found.append(batch)
        count += count_samples(batch[0])
        if count >= samples:
            return found, False
    return found, True


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {', '.join(type(one).__name__ for one in value)}"
    return type(value).__name__

"""Frozen dataclasses of tensors: moved, mapped and saved by one implementation for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self


class Record:
    """Mixin of frozen dataclasses of tensors, records and plain values, or tuples of such.

    Fields named ``layout`` say what the numbers belong to; they are not saved but handed over when
    a record is restored.
    """

    _kinds: ClassVar[dict[str, type[Record]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the class known by its name, under which its records are saved."""
        super().__init_subclass__(**kwargs)
        Record._kinds[cls.__name__] = cls

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the record."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            yield from _tensors(getattr(self, field.name))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the record with a function applied to every tensor."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        values = {field.name: _mapped(getattr(self, field.name), function) for field in fields}
        return type(self)(**values)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Return the record on a device and with its floating-point tensors in a type."""

        def move(tensor: Tensor) -> Tensor:
            kind = dtype if tensor.is_floating_point() and tensor.dim() else None
            return tensor.to(device=device, dtype=kind)

        return self.mapped(move)

    def state_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists of tensors and plain values."""
        state: dict[str, Any] = {"kind": type(self).__name__}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.name != "layout":
                state[field.name] = _packed(getattr(self, field.name))
        return state

    @staticmethod
    def from_state(state: Mapping[str, Any], device: torch.device, layout: Any = None) -> Any:
        """Return the record that :meth:`state_dict` described.

        Args:
            state: What it returned.
            device: Where the tensors go.
            layout: What its ``layout`` fields are set to.

        Raises:
            ValueError: If the state names no kind of record.
        """
        kind = Record._kinds.get(state.get("kind", ""))
        if kind is None:
            raise ValueError(f"the checkpoint holds an unknown kind {state.get('kind')!r}")
        restored = getattr(kind, "restored", None)
        if restored is not None:
            return restored(state, device, layout)
        values = {
            field.name: _unpacked(state[field.name], device, layout)
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]
            if field.name in state
        }
        if any(field.name == "layout" for field in dataclasses.fields(kind)):  # type: ignore[arg-type]
            values["layout"] = layout
        return kind(**values)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Record):
        yield from value.tensors()
    elif isinstance(value, (tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Record):
        return value.mapped(function)
    if isinstance(value, tuple):
        return tuple(_mapped(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    return value


def _packed(value: Any) -> Any:
    if isinstance(value, Record):
        return value.state_dict()
    if isinstance(value, tuple):
        return [_packed(item) for item in value]
    return value


def _unpacked(value: Any, device: torch.device, layout: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        if "kind" in value:
            return Record.from_state(value, device, layout)
        return {key: _unpacked(item, device, layout) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_unpacked(item, device, layout) for item in value)
    return value

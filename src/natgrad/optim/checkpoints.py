"""State dicts that hold more than torch.optim's, for checkpoints of all kinds and for copies."""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from natgrad.optim.eager import EagerOptimizer

#: The entry of a state dict, and of one parameter's state in it, that holds what is natgrad's own.
ENTRY = "natgrad"


class Carried(int):
    """A state entry that :mod:`torch.distributed.checkpoint` saves and loads as a whole.

    It takes dicts apart and restores those of their entries only that a fresh optimizer has, too,
    while which tensors make up a curvature is not known before the first update. Numbers it leaves
    alone. Copied or pickled this one is a tensor of one number that has the record as an attribute,
    which it leaves alone as well.

    Args:
        record: What is carried.
    """

    record: dict[str, Any]

    def __new__(cls, record: dict[str, Any]) -> Carried:
        """Keep the record."""
        carried = super().__new__(cls, 1)
        carried.record = record
        return carried

    def __eq__(self, other: object) -> bool:
        """Compare bit by bit with another one, or with what it becomes."""
        return _same(self.record, getattr(other, "record", other))

    def __hash__(self) -> int:
        """Return the hash of the number it stands for."""
        return super().__hash__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Become a tensor that ``torch.load(weights_only=True)`` knows."""
        return self._as_tensor(self.record).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Become it at once: torch warns of storages where the parts of a tensor are copied."""
        return self._as_tensor(copy.deepcopy(self.record, memo))

    @staticmethod
    def _as_tensor(record: dict[str, Any]) -> torch.Tensor:
        number: Any = torch.ones(())
        number.record = record
        return cast("torch.Tensor", number)


class CheckpointedOptimizer(EagerOptimizer):
    """Keeps more than groups and per-parameter state in its state dict.

    Hooks see all of it, a pre hook may repair it, a post hook runs when everything is loaded. A
    state dict that is refused changes nothing.
    """

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """Return what is saved beside groups and per-parameter state."""

    @abstractmethod
    def _checked(self, own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> Callable[[], None]:
        """Return what restores a state of :meth:`_own_state`; refuse that of another model."""

    def _carrier(self) -> torch.Tensor:
        """Return the parameter in whose state distributed checkpoints keep what is natgrad's."""
        parameters: list[torch.Tensor] = [p for group in self.param_groups for p in group["params"]]
        return next((p for p in parameters if p.requires_grad), parameters[0])

    def _mark(self) -> None:
        """Make the entry known to those who look at the live state."""
        self.state[self._carrier()].setdefault(ENTRY, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return groups, per-parameter state and, under ``"natgrad"``, all the rest.

        It holds tensors and plain values, so that ``torch.load(..., weights_only=True)`` loads it,
        and a resumed run continues exactly as an uninterrupted one. The same is in the state of one
        parameter, by reference, for :mod:`torch.distributed.checkpoint`, which sees nothing else.
        """
        handle = self.register_state_dict_post_hook(_complete, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, in the types this optimizer works in.

        Raises:
            ValueError: If it comes from another structure, model or library; nothing is changed.
        """
        restore: list[Callable[[], None]] = []

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            own = _found(given)
            if own is None:
                raise ValueError(
                    "this state dict has no natgrad curvature: it was not saved by "
                    f"{type(self).__name__}, or went through a tool that dropped it"
                )
            restore.append(self._checked(own, given))
            entries = {
                key: {k: v for k, v in entry.items() if k != ENTRY}
                for key, entry in given["state"].items()
            }
            state = {key: entry for key, entry in entries.items() if entry}
            own_groups = self.param_groups
            # Options that the checkpoint does not know stay as they are; momentum changes in place.
            groups = [
                {**(own_groups[i] if i < len(own_groups) else {}), **group}
                for i, group in enumerate(copy.deepcopy(given["param_groups"]))
            ]
            for group, present in zip(groups, own_groups, strict=False):
                _order(group, present)
            return {"state": copy.deepcopy(state), "param_groups": groups}

        def finish(_: Any) -> None:
            restore[-1]()
            if self.state:  # Else distributed checkpoints take a step that makes it, all of it.
                self._mark()

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(finish, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()


def _order(group: dict[str, Any], present: Mapping[str, Any]) -> None:
    """Bring a saved group's parameters into the order of the present group, by their names."""
    saved, own = group.get("param_names"), present.get("param_names")
    if not saved or not own or saved == own:
        return
    if set(saved) != set(own):
        raise ValueError(
            "a parameter group of the state dict holds other parameters than this optimizer's: "
            f"{sorted(set(saved) ^ set(own))}"
        )
    if not isinstance(group["params"][0], str):  # Distributed checkpoints have done it.
        numbers = dict(zip(saved, group["params"], strict=True))
        group["params"] = [numbers[name] for name in own]
    group["param_names"] = list(own)


def _same(left: Any, right: Any) -> bool:
    """Compare nested dicts and lists of tensors and plain values."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping):
        named = isinstance(right, Mapping) and left.keys() == right.keys()
        return named and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        alike = isinstance(right, (list, tuple)) and len(left) == len(right)
        return alike and all(map(_same, left, right))
    return bool(left == right)


def _complete(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Add to a state dict of torch.optim what it does not know."""
    own = optimizer._own_state()
    state_dict[ENTRY] = own
    if optimizer.state:
        optimizer._mark()
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = state_dict["state"]
    carrier = optimizer._carrier()
    for number, parameter in zip(numbers, parameters, strict=True):
        # Distributed checkpoints want an entry for every parameter if there is one for any.
        entry = {key: value for key, value in state.get(number, {}).items() if key != ENTRY}
        state[number] = {**entry, ENTRY: Carried(own)} if parameter is carrier else entry


def _found(state_dict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a state dict holds of natgrad's own."""
    entries = [state_dict, *state_dict["state"].values()]
    for entry in entries:
        own = entry.get(ENTRY) if isinstance(entry, Mapping) else None
        own = getattr(own, "record", own)
        if isinstance(own, Mapping):
            return own
    return None


def only_initialises(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step is one by which state is made and nothing else.

    :mod:`torch.distributed.checkpoint` takes it, with all gradients and learning rates zero.
    """
    groups = optimizer.param_groups
    if any(float(group["lr"]) != 0 for group in groups):
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)


class CopiedByState:
    """Copies and pickles an object as the arguments it was made with and its state dict.

    A copy so watches the copy of its model and goes on exactly as the original does. Hooks cannot
    be copied. Model and optimizer belong in one copy: ``copy.deepcopy((model, optimizer))``.
    """

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Keep the arguments."""
        instance = super().__new__(cls)
        instance._arguments = args, kwargs
        return instance

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by arguments and state."""
        return _rebuild, (type(self), *self._arguments, cast(Any, self).state_dict())


def _rebuild(
    kind: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any], state: dict[str, Any]
) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The original has said it all.
        result = kind(*args, **kwargs)
        if hasattr(result, "regroup"):
            result.regroup(state["param_groups"])  # Groups may have been added.
    result.load_state_dict(state)
    return result

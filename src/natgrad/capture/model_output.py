"""Which module is the model, and which of its outputs the likelihood looks at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def select_output(
    output: Any, select: Callable[[Any], Any] | None
) -> Tensor | dict[Any, Tensor] | None:
    """Pick the tensor the likelihood looks at, or several heads, out of a model's output.

    By default that is its ``logits`` or its first tensor or distribution, but not a number, as of
    the model's own loss. Of a distribution it is what that was made of.

    Raises:
        TypeError: If ``select`` returns something else than a tensor.
        ValueError: If a model returns its loss and several tensors that may be what that is of.
    """
    if isinstance(select, Selection):
        return select(output)
    if select is not None:
        chosen = select(output)
        if not isinstance(chosen, Tensor):
            raise TypeError(f"output=... must return a tensor, got {type(chosen).__name__}")
        return chosen
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Distribution):
        return _parameters(output)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Mapping):
        if isinstance(output.get("logits"), Tensor):
            return cast(Tensor, output["logits"])
        _check_told(output)
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        own = (one for one in output if isinstance(one, (Tensor, Distribution)))
        made = (_parameters(one) if isinstance(one, Distribution) else one for one in own)
        found = [one for one in made if one is not None]
        return min(found, key=lambda one: isinstance(one, Tensor) and not one.dim(), default=None)
    return None


def _parameters(distribution: Distribution) -> Tensor | dict[Any, Tensor] | None:
    """Return the tensor with a graph that a distribution was made of, or several by name."""
    while not distribution.arg_constraints and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    made = vars(distribution)
    given = {name: made.get(name) for name in distribution.arg_constraints}
    found: dict[Any, Tensor] = {
        name: one for name, one in given.items() if isinstance(one, Tensor) and one.requires_grad
    }
    if len(found) < 2:
        return next(iter(found.values()), None)
    return found if all(one.dim() for one in found.values()) else None


def _check_told(output: Mapping[Any, Any]) -> None:
    """Refuse a mapping in which it is not plain which tensor the loss is of."""
    tensors = {key: one for key, one in output.items() if isinstance(one, Tensor)}
    several = [repr(key) for key, one in tensors.items() if one.dim() and one.requires_grad]
    if len(several) > 1 and not next(iter(tensors.values())).dim():
        raise ValueError(
            f"the model returns its loss and {', '.join(several)}: say of which of them the loss "
            f"is, by output=lambda out: out[{several[0]}] or, if it is of several, by "
            f"likelihood={{{several[0]}: ..., {several[1]}: ...}}"
        )


def losses(output: Any) -> list[Tensor]:
    """Return the numbers with a graph that a model returns beside its outputs."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, (Mapping, tuple, list)):
        values = vars(output).values() if hasattr(output, "__dict__") else ()
    return [v for v in values if isinstance(v, Tensor) and not v.dim() and v.requires_grad]


def require_output(output: Any, select: Callable[[Any], Any] | None) -> Tensor:
    """Pick the tensor the likelihood looks at out of a model's output, which must hold one.

    Several heads are laid side by side.
    """
    chosen = select_output(output, select)
    if chosen is None:
        raise ValueError(
            "no tensor was found in the model's output; pass output=lambda out: ... to pick it"
        )
    return side_by_side(chosen) if isinstance(chosen, dict) else chosen


class Selection:
    """Picks several heads out of a model's output.

    Args:
        keys: Keys of a mapping, names of attributes, or indices in a tuple or list.
        output: Applied first, if it is given.
    """

    def __init__(self, keys: Sequence[Any], output: Callable[[Any], Any] | None = None) -> None:
        self.keys: tuple[Any, ...] = tuple(keys)
        self.output: Callable[[Any], Any] | None = output

    def __call__(self, output: Any) -> dict[Any, Tensor]:
        """Return key → tensor.

        Raises:
            ValueError: If a head is not there, or is no tensor.
        """
        output = output if self.output is None else self.output(output)
        return {key: _pick(output, key) for key in self.keys}


def _pick(output: Any, key: Any) -> Tensor:
    try:
        is_attribute = isinstance(key, str) and not isinstance(output, Mapping)
        found = getattr(output, key) if is_attribute else output[key]
    except (AttributeError, KeyError, IndexError, TypeError):
        found = None
    if isinstance(found, Distribution):
        found = _parameters(found)
    if isinstance(output, Tensor) or not isinstance(found, Tensor):
        raise ValueError(
            f"The likelihood has a head {key!r}, but the model's output, a "
            f"{type(output).__name__}, has no tensor under that key."
        )
    return found


def samples_lie_second(inputs: Any, heads: Mapping[Any, Tensor]) -> bool:
    """Return whether outputs have as many entries as the inputs in their second dimension alone.

    So do those of several members, draws or times, one behind the other.
    """
    samples = _samples_of(inputs)
    return samples is not None and all(
        one.dim() > 2 and one.shape[1] == samples != one.shape[0] for one in heads.values()
    )


def is_squeezed(inputs: Any, output: Tensor, dims: int | None) -> bool:
    """Return whether the output of one sample lacks a dimension of the ``dims`` it has of several.

    ``output.squeeze()`` does so to a last batch of one.
    """
    return output.dim() + 1 == dims and 1 not in output.shape and _samples_of(inputs) == 1


def _samples_of(inputs: Any) -> int | None:
    """Return the size that the first dimensions of all inputs share; None if they do not."""
    given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    numbers = {one.size(0) for one in given if isinstance(one, Tensor) and one.dim()}
    return numbers.pop() if len(numbers) == 1 else None


def side_by_side(heads: Mapping[Any, Tensor]) -> Tensor:
    """Return outputs ``(N, ...)`` flattened and concatenated, ``(N, Σ C)``.

    Raises:
        ValueError: If they differ in their numbers of samples.
    """
    if len({one.shape[:1] for one in heads.values()} | {torch.Size([])}) != 2:
        shapes = {key: tuple(one.shape) for key, one in heads.items()}
        raise ValueError(
            f"Heads need outputs of the same number of samples but got {shapes}; give a single "
            "sample a first dimension of size 1."
        )
    return torch.cat([one.reshape(len(one), -1) for one in heads.values()], 1)


def separated(joined: Tensor, heads: Mapping[Any, Tensor]) -> list[Tensor]:
    """Return copies of the heads that were laid side by side, made of the joined tensor.

    Their gradients then meet in the joined tensor before any layer of the model is reached.
    """
    pieces = joined.split([one[0].numel() for one in heads.values()], 1)
    return [
        piece.reshape(one.shape).to(one.dtype, copy=True)
        for piece, one in zip(pieces, heads.values(), strict=True)
    ]


def substituted(output: Any, new: Mapping[int, Tensor]) -> Any:
    """Return a model's output with other tensors in the place of some, found by their ``id``."""
    if isinstance(output, Tensor):
        return new.get(id(output), output)
    if isinstance(output, (tuple, list)):
        items = [substituted(item, new) for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    is_mapping = isinstance(output, Mapping)
    if not is_mapping and not hasattr(output, "__dict__"):
        return output
    result: Any = copy.copy(output)
    for key, value in dict(output if is_mapping else vars(output)).items():
        replaced = substituted(value, new)
        if replaced is value:
            continue
        if is_mapping:
            result[key] = replaced
        else:
            object.__setattr__(result, key, replaced)
    return result


def check_watched(
    select: Callable[[Any], Any] | None, output: Any, copies: Sequence[Tensor]
) -> None:
    """Refuse heads that are computed from the model's output, whose gradients are not watched."""
    heads = select_output(output, select)
    assert isinstance(heads, dict)
    for (key, found), watched in zip(heads.items(), copies, strict=True):
        if found is not watched:
            raise ValueError(
                f"The head {key!r} is computed from the model's output and not a tensor in it, so "
                "that the gradient of the loss cannot be seen there: let the model return it."
            )

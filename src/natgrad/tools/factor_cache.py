"""A Fisher matrix in a file, for as long as what it was made of stays the same."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.capture.evaluation import call_model, undisturbed
from natgrad.capture.model_output import require_output, unwrap
from natgrad.curvature import Curvature, Structure
from natgrad.fisher import FisherType
from natgrad.fisher.batches import batches_of, batches_with_samples
from natgrad.likelihoods import Likelihood
from natgrad.operators import FisherMatrix
from natgrad.records import Record
from natgrad.whole_files import whole_file


def cached_matrix(
    path: str | os.PathLike[str],
    make: Callable[[], FisherMatrix],
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    structure: Structure,
    fisher: FisherType,
    seed: int,
    select: Callable[[Any], Any] | None = None,
) -> FisherMatrix:
    """Return the matrix of a file, if it is that of the arguments; else make and save it.

    All arguments count: of the model its parameters, buffers, which of them are trained, and the
    outputs for the first samples, as far as they are selected; of the data every tensor. A
    structure that keeps the rows of the data, or more than its parts, and a path to something else
    or to a folder that is not there, are a ValueError.
    """
    if not structure.additive or structure.companion is not None:
        raise ValueError(
            f"structure {structure.name!r} is not kept in a file, as it is made of the rows of the "
            "data or of more than one matrix per layer: leave cache out, or take 'ekfac', 'kfac' "
            "or 'diagonal'"
        )
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder} to keep the matrix in: make it first")
    saved = _read(path) if os.path.exists(path) else {}
    parts = [_described(one) for one in (likelihood, structure, fisher)] + [str(seed)]
    digest = hashlib.sha256()
    trained = [name for name, p in unwrap(model).named_parameters() if p.requires_grad]
    state = {**model.state_dict(), **dict(unwrap(model).named_buffers())}
    _add(digest, [parts, trained, list(state.items()), list(batches_of(data))])
    key, outputs = digest.hexdigest(), _summary(unwrap(model), data, select)
    if saved.get("key") == key and _alike(saved.get("outputs"), outputs):
        return _restored(model, structure, saved["parts"])
    matrix = make()
    states = {name: one.state_dict() for name, one in matrix.parts.items()}
    with whole_file(path) as partial:
        torch.save({"key": key, "outputs": outputs, "parts": states}, partial)
    return matrix


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file holds; a ValueError unless it was written here."""
    try:
        saved = torch.load(path, weights_only=True)
    except Exception:  # Of another kind of file it may be anything.
        saved = None
    if not (isinstance(saved, dict) and {"key", "parts"} <= saved.keys()):
        raise ValueError(
            f"{os.fspath(path)} is no file that influence has written, or only a part of one, and "
            "stays as it is: give cache= another name, or delete it"
        )
    return saved


def _summary(model: nn.Module, data: Any, select: Callable[[Any], Any] | None) -> Tensor:
    """Return sums and sums of magnitudes over some pieces of a batch's outputs, ``(2, pieces)``.

    They tell what no parameter does: activations, the mode of layers, and which output is meant.
    """
    inputs, _ = next(batches_with_samples(data), (None, None))
    if inputs is None:
        return torch.zeros(2, 0, dtype=torch.float64)
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(0)
        output = require_output(call_model(model, inputs), select).reshape(-1)
    pieces = [one.double() for one in output.cpu().tensor_split(64)]
    return torch.stack([torch.stack([p.sum(), p.abs().sum()]) for p in pieces], 1)


def _alike(known: Tensor | None, found: Tensor) -> bool:
    """Return whether two summaries are the same but for what machines differ by."""
    if known is None or known.shape != found.shape:
        return False
    return bool(((known - found).abs() <= 1e-3 * found[1]).all())


def _restored(model: nn.Module, structure: Structure, states: Mapping[str, Any]) -> FisherMatrix:
    with Capture(model) as capture:
        layouts = {name: block.layout for name, block in capture.blocks.items()}
        curvature = Curvature(structure, layouts, capture.layout)
    device, parts = curvature.layout.device, curvature.parts
    operators = {
        name: Record.from_state(state, device, structure.vector_layout(parts[name]))
        for name, state in states.items()
    }
    return structure.matrix(curvature.layout, parts, operators)


def _described(value: Likelihood | Structure | FisherType) -> str:
    """Return a class with all of its options."""
    options = dataclasses.astuple(value) if dataclasses.is_dataclass(value) else vars(value)
    return f"{type(value).__qualname__}{options}"


def _add(found: Any, value: Any) -> None:
    """Add nested values to a hash, tensors by their bytes."""
    if isinstance(value, Tensor) and value.layout != torch.strided:
        entries = value.detach().to_sparse().coalesce()
        _add(found, [tuple(value.shape), entries.indices(), entries.values()])
    elif isinstance(value, Tensor):
        whole = value.detach().cpu().contiguous()
        found.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
        found.update(ctypes.string_at(whole.data_ptr(), whole.nbytes))
    elif isinstance(value, (list, tuple, Mapping)):
        items = list(value.items()) if isinstance(value, Mapping) else value
        found.update(f"{type(value).__name__}{len(items)}".encode())
        for item in items:
            _add(found, item)
    elif value is None or isinstance(value, (str, int, float)):
        found.update(repr(value).encode())
    else:  # What a repr leaves out would not count.
        found.update(pickle.dumps(value))

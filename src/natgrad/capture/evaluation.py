"""Running a watched model once, without leaving traces in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

from natgrad.capture.capture import Capture
from natgrad.capture.model_output import require_output, unwrap
from natgrad.capture.rows import RowsUnavailable
from natgrad.distributed.shards import whole_parameters
from natgrad.jacobians import Jacobians


@contextmanager
def evaluated(capture: Capture, inputs: Any) -> Iterator[Tensor]:
    """Run the model of a capture and give the output to pull vectors back from.

    Passes recorded before are forgotten. At the end the random state and the buffers of the model
    are again as they were.

    Raises:
        ValueError: If the model's output holds no tensor or depends on no trainable parameter.
        RuntimeError: If it runs inside ``torch.inference_mode()``, or a layer inside reentrant
            checkpoints.
    """
    refuse_inference_mode()
    capture.clear()
    with undisturbed(capture.model):
        with torch.enable_grad():
            output = require_output(call_model(capture.model, inputs), capture.select)
        if not output.requires_grad:
            raise ValueError(
                "the model's output does not depend on any trainable parameter; pass "
                "output=lambda out: ... to pick the right tensor"
            )
        recorded = capture.passes[-1]
        parts = whole_parameters(capture.model, True) if capture.shards else nullcontext()
        with parts:
            capture.settle(recorded)
            for name, reason in capture.sources.unavailable.items():
                raise RowsUnavailable(f"there are no rows for {name!r}: {reason}")
            assert recorded.output is not None
            yield recorded.output


def refuse_inference_mode() -> None:
    """Raise a RuntimeError inside ``torch.inference_mode()``, where derivatives are zero."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "natgrad differentiates the model, which torch.inference_mode() makes impossible: "
            "leave it, or use torch.no_grad(), which does no harm here"
        )


def output_rows(capture: Capture, inputs: Any) -> tuple[Tensor, Jacobians]:
    """Return a model's outputs ``(N, …)``, detached, and the Jacobian rows of every one of them.

    The rows have one direction per output of a sample. No samples, or an output that depends on no
    trainable parameter, are a ValueError.
    """
    with evaluated(capture, inputs) as output:
        if output.dim() == 0 or len(output) == 0:
            raise ValueError(
                f"the output has shape {tuple(output.shape)}, so there is no sample to look at: "
                "give inputs of at least one, and an output that begins with their dimension"
            )
        rows = capture.pull_back(output, unit_vectors(output), retain_graph=False)
        return output.detach(), rows


def unit_vectors(output: Tensor) -> Tensor:
    """Return the unit vector of every output of a sample ``(C, *output.shape)``, as a view.

    Samples of one number each, ``(N,)``, have one output.
    """
    shape, size = output.shape, output[0].numel()
    eye = torch.eye(size, dtype=output.dtype, device=output.device)
    return eye.reshape(size, 1, *shape[1:]).expand(size, *shape)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a dict of keyword arguments.

    A list, which is what data loaders make of tuples, holds arguments if the model needs several.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    spread = isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence)
    if spread or (isinstance(inputs, list) and not takes(model, (inputs,), {})):
        return model(*inputs)
    return model(inputs)


def takes(model: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Return whether a model can be called with such arguments, as far as its signature tells."""
    try:
        inspect.signature(unwrap(model).forward).bind(*arguments, **named)
    except TypeError:
        return False
    except ValueError:  # It has no signature.
        pass
    return True


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the random state and the buffers a forward pass may change, in place or by others."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    held = [(m, n, b) for m in model.modules() for n, b in m._buffers.items()]
    saved = [
        (module, buffer, buffer._version, buffer.clone())
        for module, _, buffer in held
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, name, buffer in held:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
        with torch.no_grad():
            for module, buffer, version, values in saved:
                # Batch norms change their statistics without another version. Elsewhere it tells,
                # and what nobody changed may belong to a graph of the user's.
                if module.training or buffer._version != version:
                    buffer.copy_(values)


@contextmanager
def attention_by_products() -> Iterator[None]:
    """Have attention made of products: its own kernels know no second or forward derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def tensors_of(inputs: Any) -> list[Tensor]:
    """Return the tensors among the inputs of a model."""
    if isinstance(inputs, Tensor):
        return [inputs]
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    return [value for value in values if isinstance(value, Tensor)]


def count_samples(inputs: Any) -> int:
    """Return the first dimension of all tensors in inputs; a ValueError if it is not one."""
    tensors = tensors_of(inputs)
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "inputs must be tensors with the same number of samples, at least 1, along their first "
            f"dimension, got shapes {[tuple(tensor.shape) for tensor in tensors]}"
        )
    return sizes.pop()


def take_samples(inputs: Any, samples: slice) -> Any:
    """Return some samples of a tensor, or of every tensor in a tuple, list or dict."""
    if isinstance(inputs, Tensor):
        return inputs[samples]
    if isinstance(inputs, Mapping):
        return {k: v[samples] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    found = (v[samples] if isinstance(v, Tensor) else v for v in inputs)
    return list(found) if isinstance(inputs, list) else tuple(found)

"""Modules of other authors that compute what a layer of a known kind does.

Libraries write linear maps and norms of their own. A module with a ``weight`` and perhaps a
``bias`` is tried: it runs once more with both changed at random, and if its output changes as that
of a known layer would, its rows are those of such a layer, whatever else it adds. So are those of
tables whose rows are scaled, or looked up by numbers that the module makes itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.capture.embedding import LookupKind, looked_up
from natgrad.capture.kinds import LayerCall, LayerKind
from natgrad.capture.linear import LinearKind, TransposedLinearKind
from natgrad.capture.normalization import GROUP_NORM, NormalizationKind
from natgrad.capture.rerun import rerun, whole_values

#: Standard deviation of inputs that show the ε of a norm.
SMALL = 1e-3


def kind_by_trial(module: nn.Module) -> LayerKind | None:
    """Return the kind of layer that a module without layers of its own computes as, or None.

    It is tried on random inputs, if it has nothing but a weight, and perhaps a bias, to remember.
    """
    own = dict(module.named_parameters())
    if any(True for _ in module.children()) or not {"weight"} <= set(own) <= {"weight", "bias"}:
        return None
    weight = own["weight"]
    if not (1 <= weight.dim() <= 2 and weight.numel() and weight.is_floating_point()):
        return None
    if isinstance(module, nn.Embedding):
        return _lookup(module)
    if any(True for _ in module.buffers()):
        return None
    held = whole_values(module)
    shapes = [(2, 3, features) for features in dict.fromkeys(reversed(weight.shape))]
    for shape in [*shapes, (2, *weight.shape, 2, 3)]:
        devices = [weight.device] if weight.is_cuda else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                inputs = torch.randn(shape, dtype=weight.dtype, device=weight.device)
                output = rerun(module, held, (inputs,))
        except Exception:  # It takes other inputs.
            continue
        found = kind_alike(module, inputs, output)
        if found is not None:
            return found
    return _lookup(module)


def kind_alike(module: nn.Module, inputs: Tensor, output: Tensor) -> LayerKind | None:
    """Return the kind of layer that a module, by one call of it, computes as, or None.

    Known are ``x Wᵀ + b`` and ``x W + b`` of a matrix, layer norm and RMS norm over the last
    dimension or over the channels of images, and group norm, each up to terms without the
    parameters (``1 + weight``, a frozen part). The module runs again a few times, on copies of its
    buffers and without its hooks.
    """
    own = whole_values(module)
    if "weight" not in own or not set(own) <= {"weight", "bias"} or not inputs.dim():
        return None
    if not (inputs.is_floating_point() and inputs.numel() and isinstance(output, Tensor)):
        return None
    if output.is_complex():
        return None
    weight, bias, features = own["weight"], own.get("bias"), inputs.shape[-1]
    found: LayerKind | None = None
    try:
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            if weight.dim() == 2:
                found = _linear(module, inputs.detach(), output.detach(), own)
            elif bias is None or bias.shape == weight.shape:
                if weight.shape == (features,):
                    found = _norm(module, inputs.detach(), output.detach(), own)
                if found is None and inputs.dim() == 4 and weight.shape == inputs.shape[1:2]:
                    found = _norm_of_images(module, inputs.detach(), output.detach(), own)
    except Exception:  # Whatever a strange module raises: it is not of a known kind.
        return None
    return found


def _linear(
    module: nn.Module, inputs: Tensor, output: Tensor, own: dict[str, Tensor]
) -> LayerKind | None:
    changes = {name: _noise(p, inputs.shape[-1] ** -0.5) for name, p in own.items()}
    difference = _output(module, inputs, own, changes) - output
    for kind, weight in (
        (LinearKind(), changes["weight"]),
        (TransposedLinearKind(), changes["weight"].T),
    ):
        if weight.shape == (output.shape[-1], inputs.shape[-1]):
            expected = functional.linear(inputs, weight, changes.get("bias"))
            if _same(difference, expected):
                return kind
    return None


def _norm(
    module: nn.Module, inputs: Tensor, output: Tensor, own: dict[str, Tensor], images: bool = False
) -> LayerKind | None:
    if output.shape != inputs.shape:
        return None

    def run(rows: Tensor, changes: dict[str, Tensor]) -> Tensor:
        given = rows.movedim(-1, 1) if images else rows
        found = _output(module, given, own, changes)
        return found.movedim(1, -1) if images else found

    changes = {name: _noise(p, 1.0) for name, p in own.items()}
    difference = run(inputs, changes) - output
    # Inputs as small as ε: their normalised form tells ε, which stands in no parameter.
    probe = SMALL * (torch.randn(4, 4, 4, inputs.shape[-1], device=inputs.device) + 1.0)
    probe = (probe if images else probe.flatten(0, 2)).to(inputs.dtype)
    only = {"weight": torch.ones_like(own["weight"])}
    normalized = run(probe, only) - run(probe, {})
    for center in (True, False):
        centered = probe - probe.mean(-1, keepdim=True) if center else probe
        centered, variance = centered.double(), centered.double().square().mean(-1)
        scale = (normalized * centered).sum(-1) / centered.square().sum(-1)
        eps = max(float((scale.square().reciprocal() - variance).median()), 0.0)
        said = [e for e in vars(module).values() if isinstance(e, float) and _close(e, eps)]
        eps = said[0] if said else eps  # What is measured is rounded.
        expected = normalize(inputs, center, eps) * changes["weight"] + changes.get("bias", 0.0)
        if _same(normalized, normalize(probe, center, eps)) and _same(difference, expected):
            rows = partial(_normalized, center=center, eps=eps)
            return NormalizationKind(rows, channels_first=images, by_rows=True)
    return None


def _norm_of_images(
    module: nn.Module, inputs: Tensor, output: Tensor, own: dict[str, Tensor]
) -> LayerKind | None:
    if isinstance(module, nn.GroupNorm):
        changes = {name: _noise(p, 1.0) for name, p in own.items()}
        expected = functional.group_norm(
            inputs, module.num_groups, changes["weight"], changes.get("bias"), module.eps
        )
        alike = _same(_output(module, inputs, own, changes) - output, expected)
        return GROUP_NORM if alike else None
    return _norm(module, inputs.movedim(1, -1), output.movedim(1, -1), own, images=True)


def _lookup(module: nn.Module) -> LayerKind | None:
    """Return the kind of a table that is given integers, or None."""
    own = whole_values(module)
    if set(own) != {"weight"} or own["weight"].dim() != 2:
        return None
    weight = own["weight"]
    numbers = torch.arange(6, device=weight.device).reshape(2, 3) % len(weight)
    try:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            changes = {"weight": torch.randn_like(weight)}
            output = _output(module, numbers, own, {})
            difference = _output(module, numbers, own, changes) - output
            rows, factors = looked_up(module, (numbers,), {}).unbind(-1)
            expected = factors.unsqueeze(-1) * changes["weight"][rows.long()]
    except Exception:  # Whatever a strange module raises: it is not of a known kind.
        return None
    return LookupKind() if _same(difference, expected.to(difference.dtype)) else None


def normalize(inputs: Tensor, center: bool, eps: float) -> Tensor:
    """Return ``x̂``, by layer norm if ``center``, else by RMS norm."""
    norm = functional.layer_norm if center else functional.rms_norm
    return norm(inputs, inputs.shape[-1:], eps=eps)


def _close(left: float, right: float) -> bool:
    return abs(left - right) <= 1e-2 * right


def _normalized(call: LayerCall, rows: Tensor, center: bool, eps: float) -> Tensor:
    return normalize(rows, center, eps)


def _noise(like: Tensor, scale: float) -> Tensor:
    return scale * torch.randn_like(like)


def _output(
    module: nn.Module, inputs: Tensor, own: dict[str, Tensor], changes: dict[str, Tensor]
) -> Tensor:
    state = {name: p + changes[name] if name in changes else p for name, p in own.items()}
    result: Tensor = rerun(module, state, (inputs,))
    return result


def _same(found: Tensor, expected: Tensor) -> bool:
    """Return whether tensors differ by rounding."""
    if found.shape != expected.shape:
        return False
    # In float64 so strict that a module which computes in float32 is none.
    share = 1e-10 if found.dtype == torch.float64 else 4 * torch.finfo(found.dtype).eps ** 0.5
    limit = share * expected.double().norm()
    return bool((found.double() - expected.double()).norm() <= limit)

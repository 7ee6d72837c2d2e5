"""How much of squared errors is noise, as far as training shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from natgrad.optim.step.measured_length import averaged

#: A squared residual as large stands for one that is not known.
UNKNOWN = 1e200


@dataclass(frozen=True)
class NoiseToSignal:
    """What is known of the mean squared residual R, by measurements on batches.

    Attributes:
        log_residual: The average of log R; None before the first measurement.
        log_largest: The largest of these averages.
    """

    log_residual: float | None = None
    log_largest: float = -math.inf

    @property
    def ratio(self) -> float:
        """Of what is left to what has been explained, at most 1."""
        if self.log_residual is None:
            return 1.0
        left = math.exp(self.log_residual - self.log_largest)
        return left / (1.0 - left) if left < 0.5 else 1.0

    def measured(self, residual: float, memory: float) -> NoiseToSignal:
        """Return the state after a measurement.

        Args:
            residual: The mean squared residual of a batch.
            memory: Weight of the past.
        """
        if not 0 < residual < UNKNOWN:
            return self
        found = averaged(self.log_residual, math.log(residual), memory)
        return NoiseToSignal(found, max(self.log_largest, found))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> NoiseToSignal:
        """Return the state that :meth:`state_dict` described."""
        return cls(**values)

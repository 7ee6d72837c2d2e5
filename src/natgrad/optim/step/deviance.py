"""What is left of the deviance, as far as training shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from natgrad.optim.step.length_state import averaged

#: A deviance as large stands for one that is not known.
UNKNOWN = 1e200

#: Share of ``‖∇L‖²/R`` that tr F counts as at least.
LEAST_TRACE = 0.01


@dataclass(frozen=True)
class Deviance:
    """What is known of R, twice what the loss can fall by, by measurements on batches.

    Of a Gaussian it is the mean squared residual.

    Attributes:
        log_present: The average of log R; None before the first measurement.
        log_largest: The largest of these averages.
        least_trace: What ``tr F`` counts as at least, by the last gradient measured.
    """

    log_present: float | None = None
    log_largest: float = -math.inf
    least_trace: float = 0.0

    @property
    def left(self) -> float:
        """Share of it that is left, ``R/R_max``; 1 where it is not known."""
        return 1.0 if self.log_present is None else math.exp(self.log_present - self.log_largest)

    @property
    def noise_to_signal(self) -> float:
        """Ratio of what is left to what has been explained, at most 1."""
        return self.left / (1.0 - self.left) if self.left < 0.5 else 1.0

    def measured(self, present: float, memory: float, square: float = 0.0) -> Deviance:
        """Return the state after a measurement.

        Args:
            present: R of a batch.
            memory: Weight of the past.
            square: ``‖∇L‖²`` of the batch; 0 if unknown.
        """
        if not 0 < present < UNKNOWN:
            return self
        found = averaged(self.log_present, math.log(present), memory)
        return Deviance(found, max(self.log_largest, found), LEAST_TRACE * square / present)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Deviance:
        """Return the state that :meth:`state_dict` described."""
        return cls(**values)

"""What was measured for a claim, kept as one JSON file a claim and size."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_map_only

from natgrad.experiments.claims.claim import Claim, Figures, Verdict
from natgrad.experiments.config import ConfigError
from natgrad.experiments.results import strict


@dataclass
class Result:
    """The figures of one claim at one size.

    Attributes:
        claim: Name of the claim.
        full: Whether at the published size.
        command: The command that repeats it.
        data: Name of the data set.
        seed: Seed of everything random.
        environment: Versions and machine.
        created: When it was finished, ISO 8601.
        seconds: How long it took, all sittings together.
        figures: The figures; none while it is not finished.
        parts: What finished parts found, for an interrupted measurement to go on from.
        error: Why the measurement failed, if it did: the verdict then is that it cannot be told.
    """

    claim: str
    full: bool
    command: str
    data: str
    seed: int
    environment: dict[str, Any]
    created: str = ""
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def is_final(self) -> bool:
        """Whether the measurement has ended, well or not."""
        return bool(self.figures or self.error)

    def verdict(self, claim: Claim) -> Verdict:
        """Return the verdict of the claim's rule as it stands now."""
        return claim.verdict(self.figures)

    def to_json(self) -> str:
        """Return the result as strict JSON: infinite numbers and NaN become strings."""
        values = strict(dataclasses.asdict(self), str)
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def result_path(folder: Path, claim: Claim, full: bool) -> Path:
    """Return the file in which a result is kept."""
    return folder / f"{claim.name}{'.full' if full else ''}.json"


def read_result(path: Path) -> Result | None:
    """Return a kept result, None if there is none; a ConfigError if it cannot be read."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("figures", "parts"):
            values[key] = tree_map_only(str, float, values[key])
        return Result(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} does not hold a result of natgrad claims ({error}): remove it, or give "
            "another --output."
        ) from error

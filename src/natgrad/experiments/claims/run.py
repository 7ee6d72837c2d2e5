"""`natgrad claims`: measure one claim after the other; what is found is kept, a file each."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_map_only

from natgrad.experiments.claims.claim import Claim, Figures, Setting, Verdict
from natgrad.experiments.config import ConfigError
from natgrad.experiments.environment import describe_environment
from natgrad.experiments.pages import format_seconds, write_whole
from natgrad.experiments.progress import Progress
from natgrad.experiments.results import strict


@dataclass
class Result:
    """The figures of one claim at one size, none while it is not finished.

    `full` says whether the size is the published one, `command` what repeats it, `created` when it
    was finished (ISO 8601), `seconds` how long it took, all sittings together. `parts` are what an
    interrupted measurement goes on from, `error` is why one has failed.
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
        values |= {key: tree_map_only(str, float, values[key]) for key in ("figures", "parts")}
        return Result(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} does not hold a result of natgrad claims ({error}): remove it, or give "
            "another --output."
        ) from error


def run_claims(
    claims: Sequence[Claim],
    output: Path,
    setting: Setting | None = None,
    *,
    again: bool = False,
    observer: Progress | None = None,
) -> tuple[list[Result], bool]:
    """Measure claims, except those whose results are kept, and keep the results in a folder.

    The results come with whether Ctrl-C ended the run before all were there. The parts that an
    interrupted measurement had finished are kept; it goes on from there. So are those of one that
    failed, whose result says why. `again` measures what is there already, too.

    Raises `ConfigError` if a kept result cannot be read or the device is not there, and `DataError`
    if the data cannot be used.
    """
    observer, setting = observer or Progress(), setting or Setting()
    results: list[Result] = []
    for claim in claims:
        path = result_path(output, claim, setting.full)
        kept, spent = None if again else read_result(path), "kept"
        if kept is None or not kept.figures:
            observer.begin(claim.name)
            try:
                kept = _measure(claim, setting, path, kept, observer.progress)
            except KeyboardInterrupt:
                return results, True
            observer.progress(1.0)
            spent = format_seconds(kept.seconds)
        results.append(kept)
        why = f", as it failed: {kept.error}" if kept.error else ""
        observer.end(f"{claim.name}: {kept.verdict(claim)}{why} ({spent})")
    return results, False


def _measure(
    claim: Claim,
    setting: Setting,
    path: Path,
    kept: Result | None,
    progress: Callable[[float], None],
) -> Result:
    data = claim.data_for(setting.full, setting.data_dir)
    command = f"natgrad claims {claim.name}{' --full' if setting.full else ''}"
    command += f" --seed {setting.seed}" if setting.seed else ""
    command += " --data-dir DIR" if data != "digits" else ""
    environment = describe_environment(setting.torch_device())
    result = Result(claim.name, setting.full, command, data, setting.seed, environment)
    if kept is not None and (kept.seed, kept.data) == (result.seed, result.data):
        result.parts, result.seconds = kept.parts, kept.seconds
    began = time.perf_counter() - result.seconds

    def store() -> None:
        result.seconds = time.perf_counter() - began
        write_whole(path, result.to_json().encode())

    folder = None if data == "digits" else setting.data_dir
    own: dict[str, Any] = {"parts": result.parts, "store": store, "progress": progress}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Skipped steps of diverging runs.
        try:
            measured = dataclasses.replace(setting, data=data, data_dir=folder, **own)
            result.figures, result.parts = claim.measure(measured), {}
        except (RuntimeError, ArithmeticError) as error:  # Parts that had ended are kept.
            result.error = next(iter(str(error).strip().splitlines()), type(error).__name__)
    result.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    store()
    return result

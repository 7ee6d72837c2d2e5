"""`natgrad claims`: measure claims one after the other, and keep what each measurement finds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from natgrad.experiments.claims.claim import Claim, Setting
from natgrad.experiments.claims.results import Result, read_result, result_path
from natgrad.experiments.config import find_device
from natgrad.experiments.environment import describe_environment
from natgrad.experiments.pages import format_seconds, write_whole
from natgrad.experiments.progress import Progress

__all__ = ["ClaimsConfig", "run_claims"]


@dataclass(frozen=True)
class ClaimsConfig:
    """The options of a run.

    Attributes:
        output: Folder of the results, one file a claim.
        full: Whether to measure at the published sizes.
        again: Whether to measure what is there already.
        data_dir: Folder with the data sets.
        seed: Seed of everything random.
        device: auto, cpu, cuda or cuda:N.
    """

    output: Path
    full: bool = False
    again: bool = False
    data_dir: Path | None = None
    seed: int = 0
    device: str = "auto"


def run_claims(
    claims: Sequence[Claim], config: ClaimsConfig, observer: Progress | None = None
) -> tuple[list[Result], bool]:
    """Measure claims, except those whose results are kept.

    Args:
        claims: The claims.
        config: The options.
        observer: Told of progress; silent by default.

    Returns:
        The results, and whether Ctrl-C ended the run before all were there. The parts that an
        interrupted measurement had finished are kept; it goes on from there. So are those of one
        that failed, whose result says why.

    Raises:
        ConfigError: If a kept result cannot be read, or the device is not there.
        DataError: If the data cannot be used.
    """
    observer = observer or Progress()
    results: list[Result] = []
    for claim in claims:
        path = result_path(config.output, claim, config.full)
        kept, spent = None if config.again else read_result(path), "kept"
        if kept is None or not kept.figures:
            observer.begin(claim.name)
            try:
                kept = _measure(claim, config, path, kept, observer.progress)
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
    config: ClaimsConfig,
    path: Path,
    kept: Result | None,
    progress: Callable[[float], None],
) -> Result:
    data = claim.data_for(config.full, config.data_dir)
    command = f"natgrad claims {claim.name}{' --full' if config.full else ''}"
    if config.seed:
        command += f" --seed {config.seed}"
    result = Result(
        claim.name,
        config.full,
        command if data == "digits" else f"{command} --data-dir DIR",
        data,
        config.seed,
        describe_environment(find_device(config.device)),
    )
    if kept is not None and (kept.seed, kept.data) == (result.seed, result.data):
        result.parts, result.seconds = kept.parts, kept.seconds
    before, began = result.seconds, time.perf_counter()

    def store() -> None:
        result.seconds = before + time.perf_counter() - began
        write_whole(path, result.to_json().encode())

    setting = Setting(
        config.full,
        config.seed,
        data,
        None if data == "digits" else config.data_dir,
        config.device,
        result.parts,
        store,
        progress,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Skipped steps of diverging runs.
        try:
            result.figures, result.parts = claim.measure(setting), {}
        except (RuntimeError, ArithmeticError) as error:  # Parts that had ended are kept.
            lines = str(error).strip().splitlines()
            result.error = lines[0] if lines else type(error).__name__
    result.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    store()
    return result

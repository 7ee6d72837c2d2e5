"""`natgrad claims`: measure claims one after the other, and keep what each measurement finds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from natgrad.experiments.claims.claim import Claim, Setting
from natgrad.experiments.claims.results import Result, read_result, result_path
from natgrad.experiments.environment import describe_environment
from natgrad.experiments.pages import format_seconds, write_whole
from natgrad.experiments.progress import Progress


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
    if setting.seed:
        command += f" --seed {setting.seed}"
    if data != "digits":
        command += " --data-dir DIR"
    environment = describe_environment(setting.torch_device())
    result = Result(claim.name, setting.full, command, data, setting.seed, environment)
    if kept is not None and (kept.seed, kept.data) == (result.seed, result.data):
        result.parts, result.seconds = kept.parts, kept.seconds
    before, began = result.seconds, time.perf_counter()

    def store() -> None:
        result.seconds = before + time.perf_counter() - began
        write_whole(path, result.to_json().encode())

    folder = None if data == "digits" else setting.data_dir
    own = replace(
        setting, data=data, data_dir=folder, parts=result.parts, store=store, progress=progress
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Skipped steps of diverging runs.
        try:
            result.figures, result.parts = claim.measure(own), {}
        except (RuntimeError, ArithmeticError) as error:  # Parts that had ended are kept.
            lines = str(error).strip().splitlines()
            result.error = lines[0] if lines else type(error).__name__
    result.created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    store()
    return result

"""Scripts, run in this process as ``python script arguments`` runs them, or imported."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

#: Warnings that Python does not show of modules.
HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def load_module(path: Path) -> ModuleType:
    """Import a file that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(
    path: Path, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script; return its exit status and what it prints, warnings included."""
    command = [str(path), *map(str, arguments)]
    known, stdout, stderr = set(sys.modules), io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", command))
        stack.enter_context(mock.patch.object(sys, "path", [str(path.parent), *sys.path]))
        if environment is not None:
            stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show  # type: ignore[assignment]
        warnings.resetwarnings()
        for category in HIDDEN:
            warnings.simplefilter("ignore", category)
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit:
            status = 0 if exit.code is None else exit.code
            if isinstance(status, str):
                print(status, file=stderr)
                status = 1
        finally:
            for name in set(sys.modules) - known:  # Modules beside the script, for the next one.
                if Path(str(getattr(sys.modules[name], "__file__", ""))).parent == path.parent:
                    del sys.modules[name]
    return subprocess.CompletedProcess(command, status, stdout.getvalue(), stderr.getvalue())


def _show(message: Warning | str, category: type[Warning], file: str, line: int, *_: Any) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, file, line))

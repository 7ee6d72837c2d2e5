"""Files that appear under their names only once they are complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path to write to, beside that of the file, which it replaces if all goes well."""
    path = Path(path)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)

"""Entry point of the command ``natgrad`` and of ``python -m natgrad``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from natgrad.cli import run
    except KeyboardInterrupt:
        print("natgrad: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "natgrad":
            raise
        sys.exit(
            f"natgrad's command line needs the package {error.name!r}: "
            "install the extra with pip install 'natgrad[cli]'."
        )
    sys.exit(run())


if __name__ == "__main__":
    main()

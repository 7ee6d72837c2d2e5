"""The command line: ``natgrad compare``, ``theory``, ``claims``, ``inspect`` and ``plan``.

Wrong input ends with exit code 2 and one sentence on standard error; Ctrl-C with 130 and one line
there, after writing what was found. ``--json`` prints results alone to standard output, progress
goes to standard error. Where output is no terminal there are no colours and no live bars.
"""

from natgrad.cli.application import app, run

__all__ = ["app", "run"]

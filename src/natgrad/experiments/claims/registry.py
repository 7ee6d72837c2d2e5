"""All sources and their claims, in the order of the page."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module

from natgrad.experiments.claims.claim import Claim, Source
from natgrad.experiments.config import ConfigError

_MODULES = (
    "karakida_osawa zhang_martens_grosse ou gao karakida_akaho_amari wu donatella immer koroko "
    "korbit lin li_chen_huang chen"
)
SOURCES: tuple[Source, ...] = tuple(
    import_module(f"{__package__}.{name}").SOURCE for name in _MODULES.split()
)
"""The sources; to add one, write a module with a `SOURCE` and name it here."""


def choose(names: Sequence[str] = ()) -> list[Claim]:
    """Return the claims of some names, which may be those of sources; all if there are no names.

    A ConfigError names those that are close to an unknown one.
    """
    groups = {source.name: source.claims for source in SOURCES}
    claims = {claim.name: [claim] for found in groups.values() for claim in found}
    known = {**claims, **groups}
    chosen: dict[str, Claim] = {}
    for name in names or groups:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = (
                f"did you mean {', '.join(close)}" if close else "natgrad claims --list names all"
            )
            raise ConfigError(f"Unknown claim {name!r}: {hint}.")
        chosen |= {claim.name: claim for claim in known[name]}
    return list(chosen.values())

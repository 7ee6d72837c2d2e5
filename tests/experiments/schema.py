"""Reads the documents of results.json and checks such files against them."""

import re
from pathlib import Path

DOCUMENTS = Path(__file__).parents[2] / "docs"

SCALARS = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
}


def tables(document: str) -> dict[str, dict[str, tuple[str, str | None]]]:
    """Returns section → key → (type, section that describes its objects)."""
    sections: dict[str, dict[str, tuple[str, str | None]]] = {}
    section = ""
    for line in (DOCUMENTS / document).read_text().splitlines():
        if line.startswith("## "):
            section = line[3:].strip("` ").lower()
            sections[section] = {}
        elif row := re.match(r"\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", line):
            link = re.search(r"\(#(\w+)\)", row[3])
            sections[section][row[1]] = (row[2].strip(), link[1] if link else None)
    return sections


def check(
    value: dict,
    section: str = "top level",
    where: str = "results",
    document: str = "results-schema.md",
) -> None:
    """Asserts that an object has exactly the documented keys, of the documented types."""
    documented = tables(document)[section]
    assert set(value) == set(documented), f"{where}: {set(value) ^ set(documented)}"
    for key, (kind, link) in documented.items():
        place = f"{where}.{key}"
        if kind.startswith("array of "):
            assert isinstance(value[key], list), place
            names = kind.removeprefix("array of ").split(" or ")
            allowed = [name.rstrip("s") for name in names]
            items = value[key]
        else:
            allowed, items = kind.split(" or "), [value[key]]
        for item in items:
            assert any(SCALARS[name](item) for name in allowed), f"{place}: {item!r} is no {kind}"
            if link and isinstance(item, dict):
                check(item, link, place, document)

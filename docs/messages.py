"""All messages that natgrad can give, read off its source: the end of the page on troubleshooting.

``docs/conf.py`` puts them there when the site is built; ``python docs/messages.py`` prints them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src" / "natgrad"

#: What stands on the page in place of the messages.
MARKER = "<!-- The messages are put here, from the source, when the site is built. -->"

#: Words from which on a string of the source counts as a part of a message.
_WORDS = 4
#: Where texts are results and help, and only what is raised or warned of is a message.
_RESULTS = ("cli", "experiments", "ntk/coefficients", "ntk/conditions", "ntk/scaling")
_SILENT = ("__repr__", "__str__")


class Message(NamedTuple):
    """One message.

    Attributes:
        folder: Folder or module of natgrad that gives it.
        kind: "warning", the type of the error, or "part", of another message or of a finding that
            is warned of.
        text: Its text, with … where it names something.
    """

    folder: str
    kind: str
    text: str


def messages() -> list[Message]:
    """Return every message once, by folder."""
    found: dict[Message, None] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found.update(dict.fromkeys(_of_file(path.relative_to(SOURCE).as_posix(), tree)))
    return sorted(found, key=lambda message: message.folder)


def as_markdown() -> str:
    """Return the messages as Markdown, a heading for every folder."""
    lines: list[str] = []
    heading = ""
    for message in messages():
        if message.folder != heading:
            heading = message.folder
            lines.append(f"\n### `natgrad.{heading}`\n")
        kind = "" if message.kind.startswith(("_", "part")) else f" ({message.kind})"
        lines.append(f"- {_as_code(message.text)}{kind}")
    return "\n".join(lines) + "\n"


def _of_file(path: str, tree: ast.Module) -> Iterator[Message]:
    folder = path.split("/")[0].removesuffix(".py")
    told: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind, arguments = _name(node.exc.func), node.exc.args
        elif isinstance(node, ast.Call) and _name(node.func) == "warn":
            kind, arguments = "warning", node.args
        elif isinstance(node, ast.Expr) or getattr(node, "name", "") in _SILENT:
            told.update(ast.walk(node) if not isinstance(node, ast.Expr) else [node.value])
            continue
        else:
            continue
        for text in arguments[:1]:
            if isinstance(text, (ast.Constant, ast.JoinedStr)):
                told.update(ast.walk(text))
                yield Message(folder, kind, _text(text))
    if path.startswith(_RESULTS):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and node not in told:
            told.update(set(ast.walk(node)) - {node})
    for node in ast.walk(tree):
        if node not in told and isinstance(node, (ast.Constant, ast.JoinedStr)):
            text = _text(node)
            is_code = "[" in text and "|" in text  # A type, written as a string.
            words = [word for word in text.split() if re.search(r"[^\W\d_]{2}", word)]
            if len(words) >= _WORDS and not is_code:
                yield Message(folder, "part", text)


def _text(node: ast.Constant | ast.JoinedStr) -> str:
    if isinstance(node, ast.Constant):
        text = node.value if isinstance(node.value, str) else ""
    else:
        text = "".join(
            one.value if isinstance(one, ast.Constant) else "…"  # type: ignore[misc]
            for one in node.values
        )
    return " ".join(re.sub(r"\{\w*(![rs])?\}", "…", text).split())


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _as_code(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    return f"{ticks}{text}{ticks}"


if __name__ == "__main__":
    print(as_markdown())

"""How the documentation site is built: ``make docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import natgrad

sys.path.insert(0, str(Path(__file__).parent))
import messages  # noqa: E402, beside this file

project = "natgrad"
author = copyright = "The natgrad authors"  # noqa: A001
version = release = natgrad.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Signatures would not fit a page; shapes and types are in the text.
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "method"}
python_maximum_signature_line_length = 88
autoclass_content = "class"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
exclude_patterns = ["_build", "gallery"]
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": r"/\d\d_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),
    "show_signature": False,
}

html_theme = "furo"
html_title = f"natgrad {version}"
html_theme_options = {"source_repository": "https://github.com/natgrad/natgrad"}
templates_path, html_static_path = ["_templates"], ["_static"]
html_css_files, html_js_files = ["site.css"], ["versions.js"]

#: Pages of the repository that are pages of the site, too.
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def on_site(text: str) -> str:
    """Return a page with links that lead from page to page of the site."""
    for path, page in ELSEWHERE.items():
        text = re.sub(rf"\]\((\.\./)?{path}", f"]({page}", text)
    return re.sub(r"\]\((\.\./)?docs/", "](", text)


def setup(app: Any) -> None:
    """Rewrite links as pages are read, and put the messages where they belong."""

    def read(app: Any, name: str, content: list[str]) -> None:
        content[0] = on_site(content[0])
        if name == "troubleshooting":
            content[0] = content[0].replace(messages.MARKER, messages.as_markdown())

    def included(app: Any, path: Any, parent: str, content: list[str]) -> None:
        content[0] = on_site(content[0])

    app.connect("source-read", read)
    app.connect("include-read", included)

"""How the documentation site is built: ``make docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.inspect import signature, stringify_signature

import natgrad

sys.path.insert(0, str(Path(__file__).parent))
import messages  # noqa: E402, beside this file

project = "natgrad"
author = copyright = "The natgrad authors"  # noqa: A001
version = release = natgrad.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
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
    "write_computation_times": False,  # Its page loads scripts from elsewhere.
}

html_theme = "furo"
html_title = f"natgrad {version}"
REPOSITORY = "https://github.com/natgrad/natgrad"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view"],
}
html_math_renderer = "mathml"  # Every browser draws it itself, without a script from elsewhere.
templates_path, html_static_path = ["_templates"], ["_static"]
html_search_scorer = str(Path(__file__).parent / "search_scorer.js")
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


def write_formula(page: Any, node: Any) -> None:
    """Write a formula as MathML."""
    page.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def source_of_page(
    app: Any, name: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Lead from a page of the gallery to the program that it was made of."""
    folder, _, page = name.rpartition("/")
    if folder == "auto_gallery":
        source = "README.rst" if page == "index" else f"{page}.py"
        context["theme_source_view_link"] = f"{REPOSITORY}/blob/main/docs/gallery/{source}"


def of_class(
    app: Any, what: str, name: str, thing: Any, options: Any, shown: str, returned: str
) -> tuple[str, str] | None:
    """Return the arguments of a class whose ``__new__`` would hide them."""
    if what != "class" or shown != "(*args, **kwargs)":
        return None
    return stringify_signature(signature(thing), show_annotation=False), ""


def setup(app: Any) -> None:
    """Rewrite links as pages are read, put messages where they belong, and write formulas."""

    def read(app: Any, name: str, content: list[str]) -> None:
        content[0] = on_site(content[0])
        if name == "troubleshooting":
            content[0] = content[0].replace(messages.MARKER, messages.as_markdown())

    def included(app: Any, path: Any, parent: str, content: list[str]) -> None:
        content[0] = on_site(content[0])

    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("autodoc-process-signature", of_class)
    app.connect("html-page-context", source_of_page)
    app.connect("source-read", read)
    app.connect("include-read", included)

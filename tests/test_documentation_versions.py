"""Documentation of several versions: where each lies, which are listed, and where one begins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load_module

ROOT = Path(__file__).parents[1]

publish = load_module(ROOT / "docs/publish.py").publish


def built(folder: Path, text: str) -> Path:
    """Return a site of one page, in place of the last one."""
    for page in folder.glob("*.html"):
        page.unlink()
    folder.mkdir(exist_ok=True)
    (folder / "index.html").write_text(text)
    return folder


def first_page(pages: Path) -> str:
    found = re.search(r'url=(\S+)/"', (pages / "index.html").read_text())
    assert found is not None
    return found[1]


def test_versions_lie_side_by_side_and_are_listed_from_new_to_old(tmp_path):
    pages = tmp_path / "pages"
    published = ["latest", "v1.0.0rc1", "v0.9.0", "v1.0.0", "v1.10.0", "v1.9.1", "v2.0.0rc1"]
    begins = ["latest", "1.0.0rc1", "0.9.0", "1.0.0", "1.10.0", "1.10.0", "1.10.0"]
    for version, begin in zip(published, begins, strict=True):
        publish(built(tmp_path / "site", version), pages, version)
        assert first_page(pages) == begin  # A release; of those to come only if there is no other.
    expected = ["latest", "2.0.0rc1", "1.10.0", "1.9.1", "1.0.0", "1.0.0rc1", "0.9.0"]
    assert json.loads((pages / "versions.json").read_text()) == expected
    for version in published:
        assert (pages / version.removeprefix("v") / "index.html").read_text() == version
    assert (pages / ".nojekyll").exists()


def test_a_version_that_is_there_is_replaced_with_all_its_pages(tmp_path):
    site, pages = built(tmp_path / "site", "old"), tmp_path / "pages"
    (site / "gone.html").write_text("of a page that is no more")
    publish(site, pages, "latest")
    assert (pages / "latest" / "gone.html").exists()
    assert publish(built(site, "new"), pages, "latest") == ["latest"]
    assert (pages / "latest" / "index.html").read_text() == "new"
    assert not (pages / "latest" / "gone.html").exists()


@pytest.mark.parametrize("version", ["1.0.0", "main", "v1", "../v1.0.0", ""])
def test_other_names_are_refused_before_anything_is_written(tmp_path, version):
    pages = tmp_path / "pages"
    with pytest.raises(ValueError, match=r"'latest' or a tag such as 'v1\.2\.0'"):
        publish(built(tmp_path / "site", "x"), pages, version)
    assert not pages.exists()


def test_a_site_that_was_not_built_is_an_error_of_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "docs/publish.py"), str(tmp_path), "pages", "latest"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2 and "build it by `make docs`" in result.stderr
    assert "Traceback" not in result.stderr

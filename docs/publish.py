"""Put a built site beside those of other versions.

    python docs/publish.py site pages latest      # the branch of development, as pages/latest/
    python docs/publish.py site pages v1.2.0      # a release, as pages/1.2.0/

``pages/versions.json`` lists what is there for the choice in the sidebar (``_static/versions.js``),
and ``pages/index.html`` leads to the newest release, or to ``latest`` before the first one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

LATEST = "latest"

_INDEX = """<!doctype html>
<meta charset="utf-8">
<title>natgrad</title>
<meta http-equiv="refresh" content="0; url={0}/">
<link rel="canonical" href="{0}/">
<p>The documentation is at <a href="{0}/">{0}/</a>.</p>
"""


def publish(site: Path, pages: Path, version: str) -> list[str]:
    """Put a site in place of the one of that version, if there was one.

    Args:
        site: What ``make docs`` has built.
        pages: Folder of all versions; made if there is none.
        version: ``latest``, or a tag ``v1.2.0``, whose folder is ``1.2.0``.

    Returns:
        All versions, ``latest`` first, then from the newest to the oldest.

    Raises:
        ValueError: If the version is neither, or there is no site.
    """
    name = version.removeprefix("v")
    if version != LATEST and not re.fullmatch(r"v\d+(\.\d+)+\w*", version):
        raise ValueError(f"version must be {LATEST!r} or a tag such as 'v1.2.0', got {version!r}")
    if not (site / "index.html").exists():
        raise ValueError(f"there is no site in {site}: build it by `make docs`")
    shutil.rmtree(pages / name, ignore_errors=True)
    shutil.copytree(site, pages / name, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    (pages / ".nojekyll").touch()  # Folders that begin with _ are part of the site.
    found = [folder.name for folder in pages.iterdir() if (folder / "index.html").exists()]
    versions = sorted(found, key=_age, reverse=True)
    (pages / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf-8")
    releases = [one for one in versions if one != LATEST]
    stable = [one for one in releases if re.fullmatch(r"[\d.]+", one)]
    first = (stable or releases or versions)[0]
    (pages / "index.html").write_text(_INDEX.format(first), encoding="utf-8")
    return versions


def _age(version: str) -> tuple[bool, list[int], bool, str]:
    """Return what sorts versions from old to new: 1.0.0rc1, 1.0.0, 1.1.0, latest."""
    numbers, rest = re.fullmatch(r"([\d.]*)(.*)", version).groups()  # type: ignore[union-attr]
    return version == LATEST, [int(n) for n in numbers.split(".") if n], not rest, rest


def main() -> None:
    """Do it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("site", type=Path, help="the site that `make docs` has built")
    parser.add_argument("pages", type=Path, help="the folder of all versions")
    parser.add_argument("version", help=f"{LATEST}, or a tag such as v1.2.0")
    arguments = parser.parse_args()
    try:
        versions = publish(arguments.site, arguments.pages, arguments.version)
    except ValueError as error:
        parser.error(str(error))
    print(f"versions: {', '.join(versions)}")


if __name__ == "__main__":
    main()

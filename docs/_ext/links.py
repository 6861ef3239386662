"""Links between files of the repository lead to the pages that hold them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from sphinx.application import Sphinx

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")  # [text](path#heading), ![text](path)
PAGES = {"README.md": "docs/index.md", "docker/README.md": "docs/docker.md"}


def _relinked(text: str, folder: str, page_folder: str) -> str:
    """Return Markdown of a file in ``folder`` as it must stand in a page of ``page_folder``."""

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return posixpath.relpath(PAGES.get(path, path), page_folder)

    return LINK.sub(target, text)


def _on_page(app: Sphinx, page: str, source: list[str]) -> None:
    folder = posixpath.dirname(f"docs/{page}")
    source[0] = _relinked(source[0], folder, folder)


def _on_include(app: Sphinx, path: Path, page: str, source: list[str]) -> None:
    folder = posixpath.normpath(posixpath.join("docs", path.parent))
    source[0] = _relinked(source[0], folder, "docs")  # all pages that include a file are there


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to what is read."""
    app.connect("source-read", _on_page)
    app.connect("include-read", _on_include)
    return {"parallel_read_safe": True}

"""Links between files of the repository lead to the pages that hold them; other names stay text."""

from __future__ import annotations

import builtins
import posixpath
import re
from importlib.util import find_spec
from pathlib import Path

from docutils.nodes import Element, TextElement
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

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


def _elsewhere(
    app: Sphinx, env: BuildEnvironment, reference: Element, text: TextElement
) -> TextElement | None:
    """Return ``text`` for what is Python's or another project's: their sites are on the network."""
    name = reference["reftarget"]
    package, *rest = name.split(".")
    ours = package == "ferret_flwr"
    return text if hasattr(builtins, name) or (rest and not ours and find_spec(package)) else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen to what is read."""
    app.connect("source-read", _on_page)
    app.connect("include-read", _on_include)
    app.connect("missing-reference", _elsewhere)
    return {"parallel_read_safe": True}

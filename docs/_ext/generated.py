"""What pages tell of the code beside docstrings: run-config keys, and the commands' own help."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_type_hints

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ferret_flwr import cli
from ferret_flwr.config import Config

COMMENT = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)  # of a field, in its line
KEY = """```{{confval}} {key}
:type: {type}
:default: `{default}`

{comment}

{allowed}
```"""


def settings() -> str:
    """Return a section for each group of `Config`, as Markdown."""
    hints = get_type_hints(Config)
    parts = ["## The run", *_keys(Config, "")]
    for f in fields(Config):
        if is_dataclass(cls := hints[f.name]):
            prefix = f.name.replace("_", "-") + "."
            parts += [f"({prefix}*)=\n## {prefix}*", cls.__doc__, *_keys(cls, prefix)]
    return "\n\n".join(parts)


def _keys(cls: type, prefix: str) -> Iterator[str]:
    comments, hints = dict(COMMENT.findall(inspect.getsource(cls))), get_type_hints(cls)
    for f in fields(cls):
        if not is_dataclass(hints[f.name]):
            yield KEY.format(
                key=prefix + f.name.replace("_", "-"),
                type=hints[f.name].__name__,
                default=_toml(f.default),
                allowed=_allowed(f),
                comment=comments.get(f.name, ""),
            )


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _allowed(f: Field[Any]) -> str:
    if "choices" in f.metadata:
        return "One of " + ", ".join(f"`{choice}`" for choice in f.metadata["choices"]) + "."
    if "words" in f.metadata:
        return (
            "Any of "
            + ", ".join(f"`{word}`" for word in f.metadata["words"])
            + ", with spaces between."
        )
    low, high = f.metadata.get("range", (None, float("inf")))
    if low is None:
        return ""
    return f"At least {low}." if high == float("inf") else f"At least {low}, at most {high}."


def commands(parser: argparse.ArgumentParser | None = None) -> str:
    """Return what ``--help`` prints, for the program and each command, as Markdown."""
    parser = parser or cli._parser()
    parts = [f"## {parser.prog}", f"```text\n{parser.format_help()}```"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += [commands(choice) for choice in action.choices.values()]
    return "\n\n".join(parts)


class Generated(SphinxDirective):
    """Parse what one of this module's functions returns as if it stood in the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        text = {"settings": settings, "commands": commands}[self.arguments[0]]()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the directive."""
    app.add_directive("generated", Generated)
    return {"parallel_read_safe": True}

"""How `make docs` builds the site: from the guides, the docstrings, and nothing of the network."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]  # this checkout's package, and no other
os.environ["COLUMNS"] = "88"  # of the commands' help

from ferret_flwr import __version__  # noqa: E402

project = "ferret-flwr"
release = __version__
copyright = "the authors of ferret-flwr, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "generated",
    "links",
    "mathml",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_copy_source = False
html_title = f"ferret-flwr {release}"
html_math_renderer = "mathml"  # as browsers draw it themselves: no script from the network

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # the links that GitHub knows, too

smartquotes = False
highlight_language = "text"
default_role = "any"  # what stands in single backticks is the name of something
add_module_names = False
autosummary_generate = True
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
numpydoc_show_class_members = False  # they stand below
numpydoc_class_members_toctree = False
python_maximum_signature_line_length = 88

nitpick_ignore_regex = [(r"py:class", r"ferret_flwr\..*\.T")]  # type variables

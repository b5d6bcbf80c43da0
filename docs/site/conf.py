"""Sphinx's settings: the pages of docs/, the reference from docstrings, the examples as pages.

`make docs` builds the site into build/docs; `make docs-links` asks the web whether addresses that
lead elsewhere still answer.
"""

import sys
from pathlib import Path
from typing import Any

from pygments.lexers.shell import BashLexer

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import syncnorm  # noqa: E402

project = "syncnorm"
author = "the authors of syncnorm"
version = release = syncnorm.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "command",
    "docstrings",
    "elsewhere",
    "scripts",
]

# The root of the repository is the source, so that a link works in a clone and in the site alike.
root_doc = "docs/index"
include_patterns = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**.md",
    "examples/*.py",
    "launch/README.md",
]
exclude_patterns = [
    each.name
    for each in ROOT.iterdir()
    if each.is_dir() and each.name not in ("docs", "examples", "launch")
]

myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]

# What a name of torch or Python leads to is written out in these files: a build needs no network.
intersphinx_mapping = {
    name: (address, str(Path(__file__).with_name(f"{name}.inv")))
    for name, address in {
        "python": "https://docs.python.org/3",
        "torch": "https://docs.pytorch.org/docs/stable",
    }.items()
}
intersphinx_disabled_reftypes = ["std:*"]

smartquotes = False  # it would make one dash of the two before an option
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_type_aliases = {"groups.Spec": "syncnorm.groups.Spec"}
autodoc_inherit_docstrings = False
nitpick_ignore_regex = [
    # Type variables, which a reader understands without a page.
    ("py:class", r"syncnorm\..*\._\w+"),
    # torch's own pages have no entry for the base of its batch norms, nor for process groups.
    ("py:class", r"torch\.nn\.modules\.batchnorm\._BatchNorm"),
    ("py:class", r"torch\.distributed\.distributed_c10d\.ProcessGroup"),
    # What the package works with itself: signatures name it, no program makes one.
    (
        "py:class",
        r"Run|syncnorm\.(model\.join\.handover\.Stateful|module\.SyncNorm|family\.layer\.FamilyLayer|"
        r"train\.config\.schema\.Config|train\.data\.inputs\.Signature|"
        r"verify\.(check\.(Check|Verdict)|context\.Context|runner\.Runner))",
    ),
]
napoleon_numpy_docstring = False
# One entry may name several arguments, which a field of docutils cannot.
napoleon_use_param = False
napoleon_use_rtype = False
python_maximum_signature_line_length = 72
add_module_names = False

html_theme = "furo"
html_title = f"syncnorm {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["extra"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"


def setup(app: Any) -> None:
    """Colour commands as such: they have no prompt here, by which a lexer could know them."""
    app.add_lexer("console", BashLexer)

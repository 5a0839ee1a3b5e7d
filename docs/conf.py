"""How `make docs` builds the site: the repository's own Markdown files are its pages, docstrings its reference."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import paretofuse

project = "ParetoFuse"
author = "The ParetoFuse authors"
copyright = "the ParetoFuse authors"
release = version = paretofuse.__version__

# The source folder is the repository, so that README and guides link to each other as they do as files.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "benchmarks/README.md", "examples/README.md"]
exclude_patterns = [".*", "build", "shared", "demo", "engine", "kernels", "python", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write names in single backticks

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_title = f"ParetoFuse {release}"
html_show_sphinx = False
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    """Formulas as MathML, which browsers show by themselves: MathJax would be fetched from elsewhere."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))


def inline_formula(page: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    page.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_formula(page: HTML5Translator, node: nodes.math_block) -> None:
    """A formula by itself."""
    page.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode

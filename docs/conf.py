"""Sphinx: `make docs` builds the site into docs/_build/html, with warnings as errors.

The tutorials are text notebooks and are executed, unless ALPA_LITE_DOCS_EXECUTE is 0.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from alpa_lite.version import __version__  # noqa: E402

project = "alpa-lite"
author = "the alpa-lite authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"alpa-lite {release}"
default_role = "code"  # docstrings write `names` with single backticks

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "off" if os.environ.get("ALPA_LITE_DOCS_EXECUTE") == "0" else "force"
# The language of the cells is only known from running them.
suppress_warnings = ["myst-nb.lexer"] if nb_execution_mode == "off" else []
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # they are in the signatures
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

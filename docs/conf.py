"""How Sphinx builds the documentation: ``make docs``."""

from importlib import import_module
from pkgutil import walk_packages

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import kernels

project = "triton-cnn"
author = "the authors of triton-cnn"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["figures", "gallery"]
html_theme = "furo"
html_title = "triton-cnn"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False

# A jitted function is documented as the plain one that it was made of.
for _found in walk_packages(kernels.__path__, "kernels."):
    _module = import_module(_found.name)
    for _name, _value in [*vars(_module).items()]:
        if isinstance(_value, JITFunction | InterpretedFunction):
            setattr(_module, _name, _value.fn)

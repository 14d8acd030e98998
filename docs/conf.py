"""How Sphinx builds the site: `make docs`. Nothing is loaded from other hosts, neither fonts nor scripts."""

from __future__ import annotations

from importlib.metadata import version as version_of
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from simrl.cli import app as command_line
from simrl.experiments.config import SECTIONS, _allowed

project = "simrl"
version = release = version_of("simrl")
copyright = "the simrl authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_show_sphinx = html_copy_source = False
html_static_path = html_css_files = ["site.css"]
html_math_renderer = "mathml"
highlight_language = "none"
default_role = "py:obj"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
napoleon_use_ivar = True
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
smartquotes = False  # options have two hyphens


def command_reference() -> str:
    """The help of every command, as Markdown."""
    command = get_command(command_line)
    return get_docs_for_click(obj=command, ctx=Context(command), name="simrl", indent=1)


def configuration_keys() -> str:
    """A table of every key of a configuration's sections."""
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            default = "" if (value := field.get_default(call_default_factory=True)) is None else f"`{value!r}`"
            rows.append(f"| `{section}.{name}` | {default} | {_allowed(field)} | {field.description or ''} |")
    return "\n".join(rows)


def fill_in(app: Any, page: str, source: list[str]) -> None:
    """Put what the program says of itself into its page."""
    if page == "cli":
        source[0] = source[0].replace("<!-- commands: filled in by docs/conf.py -->", command_reference())
        source[0] = source[0].replace("<!-- keys: filled in by docs/conf.py -->", configuration_keys())


def visit_math(writer: Any, node: nodes.math) -> None:
    """A formula as MathML, which browsers draw without scripts and fonts."""
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Register the above."""
    app.connect("source-read", fill_in)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))

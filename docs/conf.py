"""The documentation site: `make docs` writes it to build/docs.

Sphinx, because among the maintained generators it is the one that reads docstrings,
checks every reference and makes warnings errors; myst-parser, so that pages are
Markdown as the README is; furo, which is light or dark as the reader's system is.

Docstrings are Google style with Markdown's code: examples are indented, and names stand
in single backticks. `prepare` makes blocks of reStructuredText of the examples, and
`find_public_name` makes links of the names that the reference describes.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring

import backprompt

project = "backprompt"
version = release = backprompt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = "backprompt"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_copy_source = False
copybutton_selector = (
    "div:not(.highlight-output):not(.highlight-text) > div.highlight > pre"
)

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else fields of a dataclass are described twice
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
default_role = "py:obj"

# Every reference must lead somewhere, but for these: code that is no name (the
# default role), types of other packages (their sites cannot be asked when there is no
# network), and aliases of types.
_OTHERS = (
    "torch|numpy|npt|transformers|sklearn|lm_eval|trl|networkx|graphviz|matplotlib"
    "|collections|typing|ray|os|pathlib"
)
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    ("py:.*", rf"({_OTHERS})\..*"),
    ("py:.*", r"DynamicCache|Tensor|Axes|Floats|FinishReason|NotFittedError"),
    ("py:.*", r"Prompts?|Aggregate|Strategy|Segment|Leaf|Adapted|Source|StoredDtype"),
    ("py:.*", r"Constraint|EndOfPrompt|OptionTypes"),
    ("py:.*", r"backprompt\.(asynchronous\.Streaming|session\.spans\.Bounds)"),
    # The protocols of engine.py; docstrings name the classes behind them.
    (
        "py:.*",
        r"(backprompt\.(text\.)?engine\.)?(Engine|Representation|Pinned|TextStream)",
    ),
    ("py:.*", r"(backprompt\.(text\.)?engine\.)?(Shown|AnyText)"),
]

_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Warns|Yields|Note):$")
_SEVERAL = re.compile(r"    (\w+)((?:, \w+)+): ")  # described together
_PLURAL = re.compile(r"(?<!`)(`[^`]+`)(\w)")  # "`Text`s"
_RAISED = re.compile(r"\w+(, \w+)*: ")


_NEVER_CALLED = {
    "ModelRepr",
    "Pin",
    "Stream",
    "GeneratedText",
    "SelectedText",
    "Stats",
    "TokenScores",
    "IndependenceGap",
}
"""Classes whose objects the library makes, so their constructors are not shown."""


def hide_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str] | None:
    """Leave out the arguments of a class that is not called."""
    return (
        ("", "")
        if what == "class" and name.rsplit(".", 1)[-1] in _NEVER_CALLED
        else None
    )


def prepare(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    lines: list[str],
) -> None:
    """Mark indented examples as code; put sentences of "Raises" behind its errors."""
    prepared: list[str] = []
    sentences: list[str] = []
    section, is_code, is_sentence = "", False, False

    def end_section() -> None:
        if sentences:
            if prepared[-1] == "Raises:":
                prepared.pop()
                sentences[0] = f"Raises: {sentences[0]}"
            prepared.extend(["", *sentences, ""])
            sentences.clear()

    for line in lines:
        is_indented = line.startswith("    ")
        if line and not is_indented:
            end_section()
            found = _SECTION.match(line)
            section, is_code, is_sentence = found[1] if found else "", False, False
        elif section == "Raises" and is_indented:
            if not line.startswith("     "):
                is_sentence = not _RAISED.match(line.strip())
            if is_sentence:
                sentences.append(line.strip())
                continue
        elif (
            is_indented
            and not section
            and not is_code
            and not (prepared and prepared[-1])
        ):
            prepared.extend([".. code-block:: python", ""])
            is_code = True
        if section == "Attributes" and (several := _SEVERAL.match(line)):
            first, others = several[1], several[2].removeprefix(", ")
            line = f"    {first}: with `{others}`: {line[several.end() :]}"
        prepared.append(_PLURAL.sub(r"\1\\ \2", line))
    end_section()
    lines[:] = prepared
    if what in ("property", "attribute"):
        # napoleon takes words before a first colon there for a type, unless the first
        # line has none.
        as_method = GoogleDocstring(prepared, app.config, app, "method", name, obj)
        lines[:] = [".. no type", "", *as_method.lines()]


def find_public_name(
    app: Sphinx,
    env: BuildEnvironment,
    node: addnodes.pending_xref,
    content: nodes.Node,
) -> nodes.Node | None:
    """Resolve a public name by its last part: `backprompt.lm.LM`, or `lm.stats`."""
    target = node["reftarget"].removesuffix("()")
    last = target.rsplit(".", 1)[-1]
    tried = [
        f"backprompt.{last}" if last in backprompt.__all__ else "",
        f"backprompt.{target}",
    ]
    if target.startswith("lm."):
        tried.append(f"backprompt.LM.{last}")
    elif target.startswith("text."):
        tried.append(f"backprompt.Text.{last}")
    domain = env.get_domain("py")
    objects = domain.data["objects"]
    for full_name in filter(None, tried):
        if full_name in objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", full_name, node, content
            )
    return None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("missing-reference", find_public_name)

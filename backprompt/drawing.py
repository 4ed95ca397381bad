"""A drawing: a graph in Graphviz's language that can be laid out without `dot` on the path."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import graphviz

from backprompt.errors import DrawingError
from backprompt.forking import ForkableLock, watch_store


class Drawing(graphviz.Digraph):  # type: ignore[misc]  # graphviz has no types
    """A `graphviz.Digraph` that needs no `dot` on the path: the Graphviz inside pygraphviz lays the graph out.

    Notebooks display the drawing. If pygraphviz is not installed, a `dot` on the path is used.
    """

    def pipe(
        self, format: str | None = None, *, engine: str | None = None, encoding: str | None = None, **options: Any
    ) -> bytes | str:
        """Return the picture as bytes, or as a string if `encoding` is given; see `graphviz.Digraph.pipe`.

        Raises:
            DrawingError: the format does not exist, or no layout program is installed.

        """
        format, engine = format or self.format, engine or self.engine
        needs_dot = any(value for name, value in options.items() if name != "quiet")
        data, missing = None, None
        if not needs_dot:
            try:
                data = _laid_out(self.source, format, engine)
            except ImportError as error:
                missing = error
        if data is not None:
            return data if encoding is None else data.decode(encoding)
        if shutil.which("dot") is None:
            raise DrawingError(_how_to_install(missing)) from missing
        piped: bytes | str = super().pipe(format, engine=engine, encoding=encoding, **options)
        return piped

    def render(
        self,
        filename: str | os.PathLike[str] | None = None,
        directory: str | os.PathLike[str] | None = None,
        view: bool = False,
        cleanup: bool = False,
        format: str | None = None,
        *,
        outfile: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> str:
        """Write the picture to a file and return its path; see `graphviz.Digraph.render`.

        `.render("tree", format="svg")` writes the source to `tree` and the picture to `tree.svg`. A path with the
        extension of a picture names the picture itself: `.render("tree.svg")` writes no other file.

        Raises:
            DrawingError: the format does not exist, or no layout program is installed.

        """
        path = Path(self.directory if directory is None else directory, outfile or filename or self.filename)
        suffix = path.suffix[1:].lower()
        is_picture = suffix in graphviz.FORMATS and format in (None, suffix) and suffix not in ("gv", "dot")
        format = format or (suffix if is_picture else self.format)
        picture = path if is_picture or outfile is not None else Path(f"{path}.{format}")
        data = self.pipe(format, **options)
        assert isinstance(data, bytes)
        picture.parent.mkdir(parents=True, exist_ok=True)
        if picture != path and not cleanup:
            path.write_text(self.source, encoding="utf-8")
        picture.write_bytes(data)
        if view:
            graphviz.view(str(picture))
        return str(picture)


_LAYOUT_LOCK = ForkableLock()
"""Guards layout: Graphviz keeps its state in globals."""
watch_store(_LAYOUT_LOCK)


def _laid_out(source: str, format: str, engine: str) -> bytes:
    """Return the picture of DOT source, laid out by the Graphviz inside pygraphviz.

    Raises:
        ImportError: pygraphviz is not installed, or a library that it needs is not.

    """
    import pygraphviz

    with _LAYOUT_LOCK:
        try:
            data = pygraphviz.AGraph(string=source).draw(format=format, prog=engine)
        except (ValueError, TypeError) as error:  # an unknown format raises a TypeError
            raise DrawingError(
                f"Graphviz cannot draw this as {format!r} with {engine!r}. Formats that it always has are "
                '"svg", "png" and "pdf".'
            ) from error
    return bytes(data)


def _how_to_install(error: ImportError | None) -> str:
    if error is None or isinstance(error, ModuleNotFoundError):
        return (
            "No program to lay out the picture is installed: neither pygraphviz nor Graphviz's `dot`. "
            "Install one: pip install pygraphviz."
        )
    return (
        f"pygraphviz is installed, but it cannot be loaded ({error}), and there is no Graphviz `dot`. Install "
        "Graphviz, which brings what is missing: apt install graphviz, for example."
    )

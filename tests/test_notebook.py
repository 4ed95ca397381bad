"""The notebook in examples/: it runs from the first cell to the last, and what is committed was made so."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install '.[test]'")
nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]'")
pytest.importorskip("ipykernel", reason="pip install '.[test]'")

from run_notebook import NOTEBOOK, run, tidy
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

ROOT = NOTEBOOK.parent.parent


@pytest.fixture(scope="module")
def committed() -> dict:
    return nbformat.read(NOTEBOOK, as_version=4)


def _printed(notebook: dict) -> Iterator[str]:
    """What each cell printed or showed, as text."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield "".join(
                output.get("text", "") + "".join(output.get("data", {}).get("text/plain", ""))
                for output in cell.outputs
            )

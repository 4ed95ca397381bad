"""Run the notebook of examples/ again, and keep what it prints and draws:

python docs/run_notebook.py
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples/backprompt_in_ten_minutes.ipynb"


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Run all cells in `folder`, in place."""
    NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out what differs from run to run: times, addresses, bars on stderr."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            if output.get("name") == "stdout" and outputs:
                outputs[-1].text += output.text  # pieces of one print
                continue
            if "image/svg+xml" in output.get("data", {}):
                output.data.pop("text/plain", None)
            outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook, NOTEBOOK.parent)
    tidy(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()

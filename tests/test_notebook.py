"""The notebook in examples/: all cells run in order, and the committed outputs come from such a run."""

import re
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install '.[test]'")
nbformat = pytest.importorskip("nbformat", reason="pip install '.[test]'")
pytest.importorskip("ipykernel", reason="pip install '.[test]'")

from transformers import AutoConfig, AutoModelForCausalLM

from run_notebook import NOTEBOOK, run, tidy
from tiny_tokenizers import MAX_VOCAB_SIZE, byte_level_bpe


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.for_model(
        "gpt2", vocab_size=MAX_VOCAB_SIZE, n_positions=1024, n_embd=32, n_layer=2, n_head=4, eos_token_id=None
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    return folder


def _is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


def test_it_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in place of the demo's, from start to end; all that the notebook asks for and prints exists."""
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))  # for the kernel
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if _is_parameters(cell)]
    parameters.source = f"model = {str(tiny_model)!r}"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    run(notebook, tmp_path)
    tidy(notebook)
    committed = nbformat.read(NOTEBOOK, as_version=4)
    for ran, kept in zip(notebook.cells, committed.cells, strict=True):
        if ran.cell_type == "code":
            kinds = [[(o.output_type, *sorted(o.get("data", {}))) for o in c.outputs] for c in (ran, kept)]
            assert kinds[0] == kinds[1], ran.source


def test_what_is_committed_was_run_in_order() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) >= 4


def test_what_is_committed_names_no_folder_of_who_ran_it() -> None:
    assert re.findall(r"/(?:root|home|Users|tmp)/\S*", NOTEBOOK.read_text(encoding="utf-8")) == []

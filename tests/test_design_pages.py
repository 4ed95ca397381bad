"""The pages of the design: each folder of the package has one, which lists the folder's modules; no page is long."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, PAGES = ROOT / "backprompt", ROOT / "docs" / "design"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MAX_ENTRY_LINES = 120


def _listed(page: Path) -> set[str]:
    """Return the modules in the first column of the page's first table."""
    table = page.read_text(encoding="utf-8").split("| module | contents |\n", 1)[1].split("\n\n", 1)[0]
    return {name for row in table.splitlines() for name in re.findall(r"`(\w+\.py)`", row.split("|")[1])}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_page_lists_the_modules_of_its_folder(folder: str) -> None:
    modules = {path.name for path in (PACKAGE / folder).glob("*.py")}
    listed = _listed(PAGES / f"{folder}.md")
    assert modules - {"__init__.py"} - listed == set(), "modules that the page does not list"
    assert listed - modules == set(), "modules that are not there"


def test_the_entry_links_every_folder_and_stays_short() -> None:
    entry = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert [folder for folder in FOLDERS if f"[{folder}](design/{folder}.md)" not in entry] == []
    assert len(entry.splitlines()) <= MAX_ENTRY_LINES


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_in_a_few_lines_what_it_keeps(folder: str) -> None:
    lines = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8").split('"""')[1].strip().splitlines()
    assert 3 <= len([line for line in lines if line]) <= 12

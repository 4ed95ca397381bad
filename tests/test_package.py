"""What the repository says about installing: the distribution's name, its ranges, and the versions that CI runs."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = ("backprompt", "benchmarks", "docs", "examples", "tests")
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in FOLDERS for kind in ("md", "py") for page in (ROOT / folder).rglob(f"*.{kind}")),
]

# `backprompt` on PyPI is another project.
INSTALLS_THE_OTHER = re.compile(r"pip install[^\n`#]*?(?<![\w./-])backprompt(?![\w-])")


def test_nobody_is_told_to_install_the_other_project_of_this_name():
    assert len(PAGES) > 200
    found = [
        f"{page.relative_to(ROOT)}: {line.strip()}"
        for page in PAGES
        if page != Path(__file__)
        for line in page.read_text(encoding="utf-8").splitlines()
        if INSTALLS_THE_OTHER.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    "line", ["pip install backprompt", "pip install 'backprompt[plot]'", "pip install torch backprompt"]
)
def test_such_a_line_is_found(line):
    assert INSTALLS_THE_OTHER.search(line)


@pytest.mark.parametrize(
    "line", ["pip install .", "pip install backprompt-lm", "pip install torch, and `backprompt --help`"]
)
def test_other_lines_are_not(line):
    assert not INSTALLS_THE_OTHER.search(line)


def test_ci_runs_every_python_that_the_classifiers_name():
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.M)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert re.search(r"python: (\[.*\])", workflow)[1] == str(versions).replace("'", '"')
    assert PROJECT["requires-python"] == f">={versions[0]}"


def test_the_oldest_versions_are_those_of_the_ranges():
    lines = (ROOT / ".github/oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    lower = {need.name: spec.version for need in map(Requirement, PROJECT["dependencies"]) for spec in need.specifier}
    assert {name: Version(version) for name, version in oldest.items()} == {
        name: Version(lower[name]) for name in oldest
    }

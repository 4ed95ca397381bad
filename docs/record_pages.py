"""Run the pages' blocks of Python with the demo model, and write down what they print:

python docs/record_pages.py [PAGE ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pages

EXAMPLES = Path(__file__).parent.parent / "examples"


def in_folder_with(model: Path, folder: Path) -> None:
    """Go to `folder`, where `load` finds the model by the name that is on the pages."""
    (folder / pages.MODEL).parent.mkdir(parents=True, exist_ok=True)
    (folder / pages.MODEL).symlink_to(model)
    os.chdir(folder)


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    from demo_model import demo_model_folder

    model = demo_model_folder()
    for page in sys.argv[1:] or pages.PAGES:
        if any(block.is_run for block in pages.blocks_of(page)):
            with tempfile.TemporaryDirectory() as folder:
                in_folder_with(model, Path(folder))
                text = pages.with_outputs(page, pages.run(page))
            (pages.DOCS / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Draw the tree of intents.py: the parts that its 480 texts share, and the parts that each text adds.

The picture at the top of the README; a line of Python in a notebook: `backprompt.draw(tree.leaves)`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from intents import DATA, SHOTS, build_tree, read_questions

from backprompt import draw, evaluate
from demo_model import add_model_argument, load_model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the tree of the demo's prompts, as evaluated.")
    add_model_argument(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent.parent / "docs" / "pictures" / "demo.svg",
        metavar="FILE",
        help="the file of the picture; .svg, .png or .pdf (default: docs/pictures/demo.svg)",
    )
    arguments = parser.parse_args(argv)
    lm = load_model(arguments.model)
    tree = build_tree(lm, SHOTS, read_questions(DATA / "questions.tsv"))
    evaluate(tree.leaves)
    drawing = draw(tree.leaves, max_children=3, max_characters=40)
    drawing.attr("graph", ranksep="0.32")
    print(drawing.render(arguments.output))


if __name__ == "__main__":
    main()

"""Draw the pictures of the pages into docs/pictures, and write what calls print into
docs/outputs, with the demo model:

    python docs/draw_pictures.py

Each shows what the page beside it tells, on texts like those of its blocks of code.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import backprompt as bp
from backprompt import LM, Text

PICTURES = Path(__file__).parent / "pictures"
OUTPUTS = Path(__file__).parent / "outputs"
EXAMPLES = Path(__file__).parent.parent / "examples"


def start(load: Callable[..., LM]) -> bp.Drawing:
    """Four texts with one beginning."""
    context = Text("Hello there.", load())
    names, ends = (" Senator", " General"), (" Amidala", " Kenobi...")
    texts = [context + name + end for name in names for end in ends]
    bp.evaluate(texts)
    return bp.draw(texts)


def forest(load: Callable[..., LM]) -> bp.Drawing:
    """Five questions behind a shot: two asked before, two now, one still to come."""
    shots = Text("Answer the question.\n", load()) + "Q: 2 + 2? A: 4\n"
    questions = [shots + f"Q: {n} + {n}? A:" for n in range(3, 8)]
    bp.evaluate(questions[:2])
    bp.evaluate(questions[:4])
    return bp.draw(questions)


def groups(load: Callable[..., LM]) -> bp.Drawing:
    """Three shots that do not see each other, and a question that sees them all."""
    instruction = Text("Answer the question.\n", load())
    shots = [Text(f"Q: What is {n} + {n}? A: {2 * n}\n") for n in range(1, 4)]
    text = instruction + (shots[0] | shots[1] | shots[2]) + "Q: What is 9 + 9? A:"
    bp.evaluate(text)
    return bp.draw(text)


def joins(load: Callable[..., LM]) -> bp.Drawing:
    """Tokens that merge over a +."""
    lm = load()
    beginning = Text("Hello the", lm)
    texts = [beginning + "re.", beginning + " general."]
    bp.evaluate(texts)
    return bp.draw(texts)


def store(load: Callable[..., LM]) -> bp.Drawing:
    """A manual read from the store, two questions that are new, one still to come."""
    manual = "Chapter 1. The lamp. Do not open the lamp while it is hot.\n" * 3
    with tempfile.TemporaryDirectory() as folder, bp.DiskStore(folder) as store:
        bp.evaluate(Text(manual, load(store=store)))
        lm = load(store=store)
        questions = ["Q: When may I open it?", "Q: What is hot?", "Q: Is it safe?"]
        texts = [Text(manual, lm) + question for question in questions]
        bp.evaluate(texts[:2])
        return bp.draw(texts)


def explain(load: Callable[..., LM]) -> bp.Explanation:
    """What five questions take, of which two were asked before."""
    lm = load(memory_bytes="2 GB")
    shots = Text("Answer the question.\n", lm) + "Q: 2 + 2? A: 4\n"
    questions = [shots + f"Q: {n} + {n}? A:" for n in range(3, 8)]
    bp.evaluate(questions[:2])
    return bp.explain(questions)


def verify(load: Callable[..., LM]) -> bp.Verification:
    """How far four texts with one beginning lie from the plain call."""
    context = Text("Hello there.", load())
    names, ends = (" Senator", " General"), (" Amidala", " Kenobi...")
    return bp.verify([context + name + end for name in names for end in ends])


def show(load: Callable[..., LM]) -> str:
    """A text of three segments, token by token."""
    shots = Text("Answer the question.\n", load()) + "Q: 2 + 2? A: 4\n"
    return (shots + "Q: 3 + 3? A:").show().plain()


DRAWN = {
    function.__name__: function for function in (start, forest, groups, joins, store)
}

PRINTED = {function.__name__: function for function in (explain, verify, show)}


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    from demo_model import demo_model_folder

    def load(**options: object) -> LM:
        return bp.load(demo_model_folder(), **options)

    OUTPUTS.mkdir(exist_ok=True)
    for name, printed in PRINTED.items():
        (OUTPUTS / f"{name}.txt").write_text(f"{printed(load)}\n", encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        svg = draw(load).pipe(format="svg", encoding="utf-8")
        (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")
        print(PICTURES / f"{name}.svg")


if __name__ == "__main__":
    main()

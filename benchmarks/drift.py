"""Drift from the plain call by dtype: the table in docs/design/exactness.md, renewed by `--write`.

Eight questions behind two worked examples, each with four labels, evaluated as one forest; 4 of the 32 texts are
compared with the plain call by `backprompt.verify` (half precision is slow on CPUs that have none of their own). On
GPT-2 124M with random weights, and on the demo model of the examples, whose probabilities are real.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from backprompt import LM, Text, Verification, load, verify
from benchmarks import workloads
from benchmarks.report import with_tables
from benchmarks.suites.search import INSTRUCTION, SHOTS
from benchmarks.tables import Table, markdown, markdown_row

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "design" / "exactness.md"
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LABELS = ("track order", "request refund", "reset account password", "report damaged parcel")
NUM_SHOTS, NUM_QUESTIONS, NUM_COMPARED = 2, 8, 4
HEAD = ["model", "dtype", "gap", "largest gap", "mean gap", "argmax flips", "tolerated"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    rows = []
    for name, make_lm in models():
        for dtype in DTYPES:
            rows.append(cells(name, dtype, verify(texts_of(make_lm(dtype)), sample=NUM_COMPARED)))
            print(markdown_row(rows[-1]), flush=True)
    table = Table("drift", markdown(HEAD, rows))
    print(f"\n{table.text}")
    if arguments.write:
        page = with_tables(PAGE.read_text(encoding="utf-8"), {table.marker: table.text})
        PAGE.write_text(page, encoding="utf-8")


def models() -> Iterator[tuple[str, Callable[[torch.dtype], LM]]]:
    """The models, each with what makes an `LM` of it in a dtype."""
    yield "GPT-2 124M, random weights", lambda dtype: LM(workloads.make_model().to(dtype), workloads.make_tokenizer())
    sys.path.insert(0, str(ROOT / "examples"))
    from demo_model import demo_model_folder

    folder = demo_model_folder()
    yield "SmolLM2-135M", lambda dtype: load(folder, dtype=dtype, device="cpu")


def texts_of(lm: LM) -> list[Text]:
    """The forest: a prefix, questions behind it, labels behind each."""
    lines = (ROOT / "examples" / "data" / "questions.tsv").read_text(encoding="utf-8").splitlines()
    questions = [line.split("\t")[0] for line in lines[:NUM_QUESTIONS]]
    shots = "".join(f"Message: {message}\nTopic: {topic}\n\n" for message, topic in list(SHOTS.items())[:NUM_SHOTS])
    context = Text(INSTRUCTION, lm) + shots
    return [context + f"Message: {question}\nTopic:" + f" {label}" for question in questions for label in LABELS]


def cells(name: str, dtype: torch.dtype, verified: Verification) -> list[str]:
    """A row of the table."""
    return [
        name,
        str(dtype).removeprefix("torch."),
        f"{verified.gap:.1e}",
        f"{verified.largest_gap:.1e}",
        f"{verified.mean_gap:.1e}",
        f"{verified.argmax_flips:,} of {verified.num_tokens:,}",
        f"{verified.tolerance:.1e}",
    ]


if __name__ == "__main__":
    main()

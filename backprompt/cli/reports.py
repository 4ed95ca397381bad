"""`backprompt explain`, `draw`, `verify`: the cost of prompts, their shared parts, their distance from plain calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backprompt
from backprompt.cli.arguments import (
    ENDS_OF_PROMPT,
    add_command,
    add_end_of_prompt,
    add_input_arguments,
    add_model_arguments,
    check_model_arguments,
    check_output,
    load_model,
    read_completions,
    read_input,
    shows_progress,
)
from backprompt.cli.prompts import split_at_common_beginnings, texts_of
from backprompt.cli.rows import PIPE, Row, as_json
from backprompt.cli.stream import positive
from backprompt.errors import CommandError
from backprompt.text.node import Text
from backprompt.visible import beginning

if TYPE_CHECKING:
    from backprompt.inspection.explanation import Named
    from backprompt.lm import LM

_SHOWN_CHARACTERS = 20
PICTURES = ("svg", "png", "pdf", "gv", "dot")


def add(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(
        commands,
        "explain",
        "the cost of evaluating prompts: tokens, passes, bytes, and whether sharing pays",
        """Show the cost of evaluating prompts, as a database explains a query: tokens in all strings, distinct tokens,
        tokens in the store, passes, bytes; where prompts stop having a common beginning, and whether sharing pays.

        Nothing is computed without --run; with it, the actual figures stand beside the expected ones.""",
        run=run_explain,
        examples=(
            "backprompt explain prompts.jsonl --model gpt2",
            "backprompt explain prompts.jsonl --completions labels.txt --model gpt2 --store prompts.bp",
            "backprompt explain prompts.jsonl --model gpt2 --run --json | jq .tokens_to_compute",
        ),
    )
    add_text_arguments(parser)
    parser.add_argument("--run", action="store_true", dest="is_run", help="evaluate, too, and show the actual figures")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)
    _add_draw(commands)
    _add_verify(commands)


def _add_draw(commands: Any) -> None:
    parser = add_command(
        commands,
        "draw",
        "a picture of the parts that prompts share",
        """Draw prompts as a tree of their parts, with shared parts drawn once. Strings are cut where strings with the
        same beginning diverge. With --model the boxes show tokens, and joins that change tokens are marked. With --run
        the prompts are evaluated, and colours distinguish computed parts from parts that were read from a store.""",
        run=run_draw,
        examples=(
            "backprompt draw prompts.jsonl -o tree.svg",
            "backprompt draw prompts.jsonl --completions labels.txt --model gpt2 --run -o tree.png",
        ),
    )
    add_text_arguments(parser)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the picture, replaced if it exists: .svg, .png, .pdf, or .gv for its source; - prints SVG",
    )
    parser.add_argument(
        "--max-children",
        type=int,
        default=6,
        metavar="N",
        help="show at most N texts behind a part, and fold the last ones (%(default)s)",
    )
    parser.add_argument(
        "--max-columns",
        type=int,
        default=9,
        metavar="N",
        help="show at most N columns, and fold the parts behind them (%(default)s)",
    )
    parser.add_argument("--run", action="store_true", dest="is_run", help="evaluate first; needs --model")
    add_model_arguments(parser, is_required=False)


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        "the difference between log-probabilities and those of plain calls",
        """Evaluate prompts, and compare all their log-probabilities with those of the model's plain call, one prompt a
        call. The report has the largest and the mean gap in nats, and says where the most probable tokens differ.""",
        run=run_verify,
        examples=(
            "backprompt verify prompts.jsonl --model gpt2 --sample 20",
            "backprompt verify prompts.jsonl --model gpt2 --dtype bfloat16 --fail-on-drift && echo close enough",
        ),
    )
    add_text_arguments(parser)
    parser.add_argument("--sample", type=positive, metavar="K", help="compare K texts, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default: %(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="largest gap that passes, at tokens of p >= 0.001 (default: by dtype; 0.001 in float32, 0.5 in bfloat16)",
    )
    parser.add_argument("--fail-on-drift", action="store_true", help="exit with 1 if a gap is larger")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for prompts, and for completions behind them."""
    add_input_arguments(parser)
    parser.add_argument(
        "--completions",
        metavar="FILE",
        help="completions to put behind each prompt: a file, or a list with commas",
    )
    add_end_of_prompt(parser)


def make_texts(
    arguments: argparse.Namespace, rows: list[Row], completions: list[str] | None, lm: LM | None
) -> list[Text]:
    """Return the texts of rows, with completions behind them if there are any."""
    prompts = texts_of(rows, lm, arguments)
    if completions is None:
        return prompts
    from backprompt.classify.completions import ends_behind, space_before

    end = ENDS_OF_PROMPT[arguments.end_of_prompt]
    ends = ends_behind(lm, [(prompt, end) for prompt in prompts])
    return [
        prompt + (space_before(completion, end) + completion)
        for prompt, end in zip(prompts, ends, strict=True)
        for completion in completions
    ]


def names_of(rows: Sequence[Row], completions: Sequence[str] | None) -> Named:
    """Return names for the texts of rows: the line of the input, counted from 1, and the completion if there is one."""

    def named(text_idx: int) -> str:
        if completions is None:
            return _line(rows[text_idx])
        row_idx, completion_idx = divmod(text_idx, len(completions))
        return f"{_line(rows[row_idx])} with {beginning(completions[completion_idx], _SHOWN_CHARACTERS)!r}"

    return named


def _line(row: Row) -> str:
    return row.where.partition(" of ")[0]


def read_all(arguments: argparse.Namespace) -> tuple[list[Row], list[str] | None]:
    """Return all rows of the input, and completions; raises for errors that show without a model."""
    if getattr(arguments, "model", None) is not None:
        check_model_arguments(arguments)
    completions = None if arguments.completions is None else read_completions(arguments.completions, arguments.encoding)
    if completions == []:
        raise CommandError(f"{arguments.completions} has no completions.")
    given = read_input(arguments)
    rows = list(given.rows())
    if not rows:
        raise CommandError(f"{given.name} has no rows.")
    return rows, completions


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the cost of evaluating the prompts."""
    rows, completions = read_all(arguments)
    lm = load_model(arguments)
    named = names_of(rows, completions)
    explained = backprompt.explain(make_texts(arguments, rows, completions, lm), analyze=arguments.is_run)
    if arguments.json:
        print(as_json(explained.to_dict(named)))
    else:
        explained.show(named)
    return 0


def run_draw(arguments: argparse.Namespace) -> int:
    """Write the picture."""
    path = Path(arguments.output)
    format = "svg" if arguments.output == PIPE else path.suffix[1:].lower()
    if format not in PICTURES:
        raise CommandError(f"{path}: a picture's name ends in one of {', '.join(f'.{name}' for name in PICTURES)}.")
    check_output(arguments)
    if arguments.model is None and (arguments.is_run or arguments.store is not None):
        raise CommandError("--run and --store need a model: --model NAME.")
    rows, completions = read_all(arguments)
    lm = None if arguments.model is None else load_model(arguments)
    if arguments.joins == "exact" and all(len(row.parts) == 1 for row in rows):  # cuts change no token
        split = split_at_common_beginnings([row.parts[0] for row in rows])
        rows = [replace(row, parts=parts) for row, parts in zip(rows, split, strict=True)]
    texts = make_texts(arguments, rows, completions, lm)
    if lm is not None and arguments.is_run:
        lm.evaluate(texts)
    drawing = backprompt.draw(texts, max_children=arguments.max_children, max_columns=arguments.max_columns)
    data = drawing.source.encode() if format in ("gv", "dot") else drawing.pipe(format)
    assert isinstance(data, bytes)
    if arguments.output == PIPE:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        path.write_bytes(data)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Print the gaps between the log-probabilities and those of plain calls."""
    rows, completions = read_all(arguments)
    lm = load_model(arguments)
    found = backprompt.verify(
        make_texts(arguments, rows, completions, lm),
        sample=arguments.sample,
        seed=arguments.seed,
        tolerance=arguments.tolerance,
        show_progress_bar=shows_progress(arguments),
    )
    num_each = len(completions or [""])  # the segment tells which completion

    def named(text_idx: int) -> str:
        return _line(rows[text_idx // num_each])

    print(as_json(found.to_dict(), allow_nan=True) if arguments.json else found.in_lines(named))
    return 1 if arguments.fail_on_drift and not found.passed else 0

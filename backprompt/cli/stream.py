"""Jobs that turn rows of prompts into rows of results, a slice at a time, and can go on after an interruption.

    check the options -> read and check all of a file -> look at what is written already -> load the model
    -> compute a slice -> append its rows -> the next slice ...

So what is wrong with the input shows before a model is loaded; but a pipe can be read only once, so there a row is
checked when its slice is.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from backprompt.cli.arguments import bound, check_model_arguments, load_model, progress, read_input
from backprompt.cli.rows import FORMATS, PIPE, Input, Output, Row, checked, format_of
from backprompt.errors import BackpromptError, CommandError
from backprompt.lm import LM
from backprompt.text import Text

PROMPTS_A_SLICE = 64
"""Their tokens are planned together; what slices have in common stays in memory in between."""

Compute: TypeAlias = "Callable[[Sequence[Text]], Sequence[Sequence[Mapping[str, Any]]]]"
"""From prompts to the new fields of each row that each becomes."""


@dataclass(frozen=True)
class Job:
    """What is done with prompts.

    Attributes:
        new_fields: the names of what it adds to a row.
        compute: what it does, with a model.
        rows_per_prompt: how many rows a prompt becomes.
        check_written: returns what is wrong with the new fields of a row that is there already, or None.

    """

    new_fields: Sequence[str]
    compute: Callable[[LM], Compute]
    rows_per_prompt: int = 1
    check_written: Callable[[Mapping[str, Any]], str | None] = lambda fields: None


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where results go."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        default=PIPE,
        metavar="FILE",
        help="JSONL or CSV; - for standard output, which is the default",
    )
    group.add_argument("--format", choices=FORMATS, help="by default by the extension; JSONL for -")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume",
        action="store_true",
        help="go on behind the rows that FILE has already, if it is there; a last one that was written half is dropped",
    )
    mode.add_argument("--overwrite", action="store_true", help="replace FILE, if it is there")
    group.add_argument(
        "--slice",
        type=positive,
        default=PROMPTS_A_SLICE,
        metavar="N",
        help="compute so many prompts together; their results are written together (default: %(default)s)",
    )


def positive(given: str) -> int:
    """Return a positive int: a type of argparse."""
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{given} is not at least 1")
    return number


def stream(arguments: argparse.Namespace, job: Job) -> int:
    """Do a job with all of the input; return the exit code."""
    check_model_arguments(arguments)
    given = read_input(arguments)
    output = _output(arguments, job)
    total = _num_rows(given, job, output) if given.is_file else None
    rows = checked(given.rows(), job.new_fields, output.format)
    is_there = arguments.resume and os.path.exists(output.path)
    num_done = output.resume(rows, job.check_written) if is_there else 0
    if total is not None and num_done == total:
        return 0
    lm = load_model(arguments)
    compute = job.compute(lm)
    output.open(append=is_there)
    try:
        with progress(arguments, total, initial=num_done) as bar:
            for group in _slices(rows, arguments.slice):
                for row, results in zip(group, _computed(lm, compute, group), strict=True):
                    output.write(row, results)
                output.flush()
                bar.update(len(group))
    finally:
        output.close()
    return 0


def _output(arguments: argparse.Namespace, job: Job) -> Output:
    path = arguments.output
    output = Output(path, format_of(path, arguments.format), job.new_fields, job.rows_per_prompt)
    if path == PIPE:
        if arguments.resume:
            raise CommandError("--resume goes on with a file: name it with -o FILE.")
        return output
    if os.path.exists(path):
        if arguments.input != PIPE and os.path.exists(arguments.input) and os.path.samefile(path, arguments.input):
            raise CommandError(f"{path} is the input. Give the output another name.")
        if os.path.isfile(path) and not (arguments.resume or arguments.overwrite):
            raise CommandError(f"{path} is there already. Go on with it: --resume; or replace it: --overwrite.")
    elif not os.path.isdir(os.path.dirname(path) or "."):
        raise CommandError(f"{path} cannot be written to: there is no folder {os.path.dirname(path)}.")
    return output


def _num_rows(given: Input, job: Job, output: Output) -> int:
    """Read all of a file, and return how many rows it has."""
    num_rows = sum(1 for _ in checked(given.rows(), job.new_fields, output.format))
    if not num_rows:
        raise CommandError(f"{given.name} has no rows.")
    return num_rows


def _slices(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while group := list(itertools.islice(rows, size)):
        yield group


def _computed(lm: LM, compute: Compute, rows: Sequence[Row]) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Compute the results of rows; an error names the row that it comes from."""
    texts = [bound(row, lm) for row in rows]
    try:
        return compute(texts)
    except BackpromptError:
        for row, text in zip(rows, texts, strict=True):
            try:
                compute([text])
            except BackpromptError as error:
                raise CommandError(f"{row.where}: {error}") from error
        raise

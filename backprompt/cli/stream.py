"""Jobs that turn rows of prompts into rows of results, a slice at a time, and can be resumed after an interruption.

    check the options -> read and check all of a file -> read the rows of an earlier output -> load the model
    -> compute a slice -> append its rows -> the next slice ...

So errors in the input show before a model is loaded. A pipe can be read only once, so each of its rows is checked
together with its slice.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from backprompt.cli.arguments import (
    check_model_arguments,
    check_output,
    load_model,
    model_options,
    progress,
    read_input,
    say,
    say_if_empty,
)
from backprompt.cli.input import Input
from backprompt.cli.output import Output
from backprompt.cli.prompts import texts_of
from backprompt.cli.rows import FORMATS, PIPE, Row, checked, format_of, shown
from backprompt.cli.wording import in_options
from backprompt.errors import BackpromptError, CommandError
from backprompt.text.node import Text
from backprompt.visible import counted

if TYPE_CHECKING:
    from backprompt.lm import LM

logger = logging.getLogger(__name__)

_MARK = "backprompt"

PROMPTS_A_SLICE = 64
"""The tokens of a slice are planned together; parts that slices share stay in memory."""

Compute: TypeAlias = "Callable[[Sequence[Text]], Sequence[Sequence[Mapping[str, Any]]]]"
"""Maps prompts to new fields: for each prompt a sequence with the fields of each of its output rows."""


@dataclass(frozen=True)
class Job:
    """A computation on prompts.

    Attributes:
        new_fields: the names of the fields that the job adds to a row.
        compute: returns the computation with a model; raises for options that the model cannot use.
        options: all options that results depend on, except the model's, by name, as values of JSON.
        rows_per_prompt: the number of output rows for each prompt.
        check_written: returns the fault in the new fields of a row of the output, in words, or None.

    """

    new_fields: Sequence[str]
    compute: Callable[[LM], Compute]
    options: Mapping[str, Any] = field(default_factory=dict)
    rows_per_prompt: int = 1
    check_written: Callable[[Mapping[str, Any]], str | None] = lambda fields: None


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the output."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        default=PIPE,
        metavar="FILE",
        help="JSONL or CSV; - for standard output, which is the default",
    )
    group.add_argument(
        "--format", choices=FORMATS, help="the format of the rows (default: by the extension; JSONL for -)"
    )
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume",
        action="store_true",
        help="continue behind the rows that FILE already has, if it exists; a half-written last row is dropped. "
        "FILE.options.json, which exists until FILE is complete, lists the options that must stay the same",
    )
    mode.add_argument("--overwrite", action="store_true", help="replace FILE, if it exists")
    group.add_argument(
        "--escape-formulas",
        action="store_true",
        help="CSV: put ' before cells that begin with =, +, - or @ and are not numbers, because spreadsheets "
        "would run them; this changes the content of such cells",
    )
    group.add_argument(
        "--slice",
        type=positive,
        default=PROMPTS_A_SLICE,
        metavar="N",
        help="compute N prompts together, and write their results together (default: %(default)s)",
    )


def positive(given: str) -> int:
    """Return a positive int; for `type=` of argparse."""
    number = int(given)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{given} is not at least 1")
    return number


def not_negative(given: str) -> int:
    """Return an int of at least 0; for `type=` of argparse."""
    number = int(given)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{given} is not at least 0")
    return number


def stream(arguments: argparse.Namespace, job: Job) -> int:
    """Do a job with all of the input; return the exit code."""
    check_model_arguments(arguments)
    given = read_input(arguments)
    with contextlib.closing(_output(arguments, job)) as output:
        return _stream(arguments, job, given, output)


def _stream(arguments: argparse.Namespace, job: Job, given: Input, output: Output) -> int:
    begun = Begun(output.path, {**model_options(arguments), **job.options})
    total = _num_rows(given, job, output) if given.is_file else None
    rows = checked(given.rows(), job.new_fields, output.format)
    num_done = 0
    begun.found()
    if os.path.isfile(output.path):
        output.claim()
        if arguments.resume:
            begun.check()
            num_done, rows = output.resume(rows, job.check_written)
    first = next(rows, None)
    if first is None:
        if not num_done:
            raise CommandError(f"{given.name} has no rows.")
        say(f"{counted(num_done * job.rows_per_prompt, 'row is', 'rows are')} there, nothing to do")
        begun.remove()
        return 0
    lm = load_model(arguments)
    compute = job.compute(lm)
    output.open()
    with progress(arguments, total, initial=num_done) as bar:
        for idx, group in enumerate(_slices(itertools.chain([first], rows), arguments.slice)):
            computed = _computed(arguments, lm, compute, group)
            if idx == 0:  # up to here no earlier output is lost
                output.cut_off()
                begun.write()
            for row, results in zip(group, computed, strict=True):
                output.write(row, results)
            output.flush()
            bar.update(len(group))
    begun.remove()
    if arguments.store is not None:
        say_if_empty(arguments.store)
    return 0


class Begun:
    """A small file beside an incomplete output, with the options that the output is written with.

    Args:
        output: the path of the output; a pipe or a device has no such file.
        options: all options that the output's rows depend on, by name, as values of JSON.

    """

    def __init__(self, output: str, options: Mapping[str, Any]) -> None:
        self._output = output
        self._path = Path(f"{output}.options.json")
        self._options = dict(options)

    def check(self) -> None:
        """Raise CommandError if the file exists and has other options.

        Options are not compared if the output is empty: then the file may belong to an earlier output.
        """
        found = self.found() if os.path.getsize(self._output) else None
        for name, now in self._options.items():
            if found is not None and (before := found.get(name)) != now:
                raise CommandError(
                    f"{self._output} was begun with another --{name.replace('_', '-')}: {shown(before)}, not "
                    f"{shown(now)}. Give the same options as before, another name, or --overwrite."
                )

    def write(self) -> None:
        """Write the file with the options that hold from now on."""
        if not self._is_kept:
            return
        part = Path(f"{self._path}.part")
        try:
            part.write_text(json.dumps({_MARK: self._options}), encoding="utf-8")
            part.replace(self._path)  # the file exists as a whole, or not
        except OSError as error:
            logger.warning("%s cannot be written (%s): --resume cannot compare options.", self._path, error.strerror)

    def remove(self) -> None:
        """Delete the file: the output is complete."""
        if self._is_kept and self.found() is not None:
            self._path.unlink()

    @property
    def _is_kept(self) -> bool:
        return self._output != PIPE and os.path.isfile(self._output)

    def found(self) -> dict[str, Any] | None:
        """Return the options in the file, or None; raises CommandError for a file that backprompt did not write."""
        try:
            options = json.loads(self._path.read_text(encoding="utf-8"))[_MARK]
            return dict(options)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise CommandError(
                f"{self._path} was not written by backprompt, which keeps the options of {self._output} under "
                "this name. Rename one of the two files."
            ) from error


def _output(arguments: argparse.Namespace, job: Job) -> Output:
    path = arguments.output
    escapes_formulas = arguments.escape_formulas
    output = Output(
        path,
        format_of(path, arguments.format, "--format"),
        job.new_fields,
        job.rows_per_prompt,
        escapes_formulas=escapes_formulas,
    )
    if escapes_formulas and output.format != "csv":
        raise CommandError("--escape-formulas is for CSV: only spreadsheets run formulas. Leave it out for JSONL.")
    check_output(arguments)
    if arguments.resume and (path == PIPE or (os.path.exists(path) and not os.path.isfile(path))):
        raise CommandError("--resume continues a file: name the file with -o FILE.")
    if path == PIPE:
        return output
    if os.path.isfile(path) and not (arguments.resume or arguments.overwrite):
        raise CommandError(f"{path} exists already. Continue it with --resume, or replace it with --overwrite.")
    return output


def _num_rows(given: Input, job: Job, output: Output) -> int:
    """Read all of a file, and return the number of its rows."""
    num_rows = sum(1 for _ in checked(given.rows(), job.new_fields, output.format))
    if not num_rows:
        raise CommandError(f"{given.name} has no rows.")
    return num_rows


def _slices(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while group := list(itertools.islice(rows, size)):
        yield group


def _computed(
    arguments: argparse.Namespace, lm: LM, compute: Compute, rows: Sequence[Row]
) -> Sequence[Sequence[Mapping[str, Any]]]:
    """Compute the results of rows; an error names the row that it comes from."""
    texts = texts_of(rows, lm, arguments)
    try:
        return compute(texts)
    except BackpromptError:
        for row, text in zip(rows, texts, strict=True):
            try:
                compute([text])
            except BackpromptError as error:
                raise CommandError(f"{row.where}: {in_options(str(error))}") from error
        raise

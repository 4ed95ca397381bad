"""Arguments that several commands have in common, and the objects made from them: an LM, texts, a bar."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import stat
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backprompt
from backprompt.cli.input import Input, decoded
from backprompt.cli.prompts import Template, check_chat, unescaped
from backprompt.cli.rows import FORMATS, PIPE, check_is_there, format_of
from backprompt.errors import CommandError
from backprompt.progress import Bar, is_terminal
from backprompt.tokens.joins import JOINS
from backprompt.visible import visible

if TYPE_CHECKING:
    from backprompt.classify.completions import EndOfPrompt
    from backprompt.lm import LM

_HELP_WIDTH = 100
WEIGHTS = ("int8", "int8-dynamic")
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
ENDS_OF_PROMPT: dict[str, EndOfPrompt] = {"auto": "auto", "space": " ", "nothing": ""}
PROGRESS_HELP = "show no progress bar; no bar shows anyway unless standard error is a terminal"


def add_command(
    commands: Any, name: str, summary: str, description: str, *, run: Any, examples: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Add a command; `description` is wrapped, and `examples` stand at the end of its help, one shell command each."""
    wrapped = [textwrap.fill(" ".join(paragraph.split()), _HELP_WIDTH) for paragraph in description.split("\n\n")]
    shown = "\n".join(f"  {example}" for example in examples)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description="\n\n".join(wrapped),
        epilog=f"examples:\n{shown}" if shown else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    group = parser.add_argument_group("messages")
    group.add_argument(
        "-v", "--verbose", action="count", default=0, help="print more on standard error; -vv prints all messages"
    )
    group.add_argument("--no-progress", action="store_true", help=PROGRESS_HELP)
    group.add_argument("--traceback", action="store_true", help="show where in the program an error was raised")
    return parser


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the file of prompts and its format."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "input",
        metavar="INPUT",
        help="prompts, one a row, as JSONL or CSV; - for standard input. A line of JSONL is a string, or an object "
        'with "prompt": a string or a list of strings, which + joins (or such a field "prompts" or "parts")',
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument("--column", metavar="NAME", help='field or column of the prompt (default: "prompt")')
    source.add_argument(
        "--template",
        type=Template.of,
        metavar="TEXT",
        help="make the prompt from several fields: 'Review: {review}\\nSentiment:'; \\n is a line break, {{ a brace",
    )
    group.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message, and the model's reply is next"
    )
    group.add_argument("--system", metavar="TEXT", help="with --chat: the system message before it")
    group.add_argument(
        "--input-format", choices=FORMATS, help="the format of the rows (default: by the extension; JSONL for -)"
    )
    group.add_argument(
        "--delimiter",
        type=_delimiter,
        metavar="CHARACTER",
        help="the character between values of CSV, such as ';', or '\\t' for a tab (default: a comma)",
    )
    group.add_argument(
        "--encoding",
        type=_encoding,
        metavar="NAME",
        help="encoding of the input and of completions, such as cp1252 (default: UTF-8)",
    )


def add_end_of_prompt(group: Any) -> None:
    """Add the argument for the string between a prompt and a completion."""
    group.add_argument(
        "--end-of-prompt",
        choices=tuple(ENDS_OF_PROMPT),
        default="auto",
        help="the string between prompt and completion; auto: a space where neither has one, nothing behind white "
        "space and special tokens (default: %(default)s)",
    )


def add_model_arguments(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """Add the arguments of `load`."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=is_required, metavar="NAME", help="the model: a hub id such as gpt2, or a folder"
    )
    group.add_argument(
        "--device", help="the model's device: cuda, mps, cpu ... (default: the first of these that is available)"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights (default: float32 on the CPU, the checkpoint's own elsewhere)",
    )
    group.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="quantize the linear layers after loading, with torchao; int8-dynamic quantizes their inputs, too "
        "(default: none)",
    )
    group.add_argument(
        "--store",
        metavar="FOLDER",
        help="a folder of results, such as prompts.bp: results in runs of 16 or more tokens are kept there, and "
        "looked up there first",
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="hold at most this much between passes, such as 2 GB (default: half of free memory)",
    )
    group.add_argument(
        "--joins",
        choices=JOINS,
        default="exact",
        help="how parts of a prompt are encoded: as one string, each on its own, or with an error where the two "
        "differ (default: %(default)s)",
    )
    group.add_argument(
        "--pack-weights", action="store_true", help="on the CPU: hold a second copy of the weights, for faster passes"
    )


def check_model_arguments(arguments: argparse.Namespace) -> None:
    """Raise for errors in the arguments that show without loading a model."""
    from backprompt.loading import available_device
    from backprompt.memory.budget import parse_bytes
    from backprompt.store.opening import is_url
    from backprompt.store.paths import check_folder

    if arguments.memory is not None:
        parse_bytes(arguments.memory, "--memory")
    if arguments.device is not None:
        available_device(arguments.device, f"--device {arguments.device}")
    if arguments.store is not None and not is_url(arguments.store):
        try:
            check_folder(arguments.store)
        except OSError as error:
            raise CommandError(f"--store: {error}") from error


def check_output(arguments: argparse.Namespace) -> None:
    """Raise for an output that cannot be written to, or that is one of the input files."""
    path = arguments.output
    written = _status(path, sys.stdout)
    for name, what in (("input", "the input"), ("completions", "--completions"), ("prior", "--prior")):
        given = getattr(arguments, name, None)
        read = None if given is None else _status(given, sys.stdin)
        if written is not None and read is not None and os.path.samestat(written, read):
            output = "standard output" if path == PIPE else path
            raise CommandError(f"{output} is {what}. Give the output another name.")
    if path == PIPE:
        return
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise CommandError(f"{path} cannot be written to: there is no folder {os.path.dirname(path)}. Create it first.")
    if os.path.isdir(path):
        raise CommandError(f"{path} is a folder. Give the output the name of a file.")


def _status(path: str, pipe: Any) -> os.stat_result | None:
    """Return the status of a regular file, which identifies it behind links and pipes, too; None for other files."""
    try:
        status = os.fstat(pipe.fileno()) if path == PIPE else os.stat(path)
    except (AttributeError, OSError, ValueError):  # a closed pipe, or a Python object in its place
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the model and the input that results depend on, by name."""
    names = ("model", "device", "dtype", "weights", "joins", "column", "chat", "system", "encoding", "delimiter")
    template = None if arguments.template is None else [list(piece) for piece in arguments.template.pieces]
    return {name: getattr(arguments, name) or None for name in names} | {"template": template}


def load_model(arguments: argparse.Namespace) -> LM:
    """Load the model that the arguments name."""
    import torch

    dtype = arguments.dtype
    return backprompt.load(
        arguments.model,
        device=arguments.device,
        dtype=dtype if dtype in (None, "auto") else getattr(torch, dtype),
        weights=arguments.weights,
        joins=arguments.joins,
        memory_bytes=arguments.memory,
        store=arguments.store,
        pack_weights=arguments.pack_weights,
    )


def read_input(arguments: argparse.Namespace) -> Input:
    """Return the input, after a check that it exists."""
    check_chat(arguments)
    check_is_there(arguments.input)
    format = format_of(arguments.input, arguments.input_format, "--input-format")
    if arguments.delimiter is not None and format != "csv":
        raise CommandError("--delimiter is for CSV: leave it out for JSONL, or add --input-format csv.")
    return Input(
        arguments.input,
        format,
        arguments.column,
        arguments.template,
        arguments.encoding,
        arguments.delimiter or ",",
    )


def read_completions(given: str, encoding: str | None = None) -> list[str]:
    """Return completions from a list with commas, a file with one a line, or a file .json with a JSON list.

    Blanks around commas and at the ends of lines are left out; a message reports blanks at the ends of lines.

    Raises:
        CommandError: the file does not exist, or cannot be read.

    """
    if not os.path.exists(given):
        if "," not in given or Path(given).suffix.lower() in (".txt", ".json"):
            raise CommandError(f"--completions {given}: no such file. Name a file, or give a list: negative,positive.")
        return [completion for part in given.split(",") if (completion := part.strip())]
    path, text = given, read_text(given, encoding)
    if Path(path).suffix.lower() != ".json":
        lines = [line for line in re.split(r"\r?\n", text) if line.strip()]
        if num_blank := sum(line != line.rstrip() for line in lines):
            ends = "the end of 1 line" if num_blank == 1 else f"the ends of {num_blank:,} lines"
            say(f"{path}: blanks at {ends} are left out; a JSON list (.json) keeps them")
        return [line.rstrip() for line in lines]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, list) or not all(isinstance(completion, str) for completion in found):
        raise CommandError(f"{path} must be a JSON list of strings.")
    return found


def read_text(path: str, encoding: str | None = None) -> str:
    """Return the text of a file, by default in UTF-8.

    Raises:
        CommandError: the file cannot be read.

    """
    try:
        data = Path(path).read_bytes()
        return decoded(data if encoding is None else data.decode(encoding).encode(), path)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeError as error:
        raise CommandError(f"{path} is not {encoding}: {error}.") from error


def _encoding(given: str) -> str:
    """Return the name of an encoding of text; for `type=` of argparse."""
    try:
        "".encode(given)
    except LookupError as error:
        raise argparse.ArgumentTypeError(f"{given} is not an encoding of text") from error
    return given


def _delimiter(given: str) -> str:
    r"""Return the character between values; for `type=` of argparse. \t is a tab."""
    character = unescaped(given)
    if len(character) != 1 or character in '"\r\n':
        raise argparse.ArgumentTypeError(f"{given!r} is not a character that separates values")
    return character


def finite(given: str) -> float:
    """Return a finite float; for `type=` of argparse."""
    number = float(given)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{given} is not a finite number")
    return number


def say(message: str) -> None:
    """Print a message to standard error, fit for a terminal; does nothing if standard error is closed."""
    if sys.stderr is not None:
        with contextlib.suppress(BrokenPipeError):
            print(f"backprompt: {visible(message)}", file=sys.stderr)


def say_if_empty(path: str) -> None:
    """Say why nothing is stored, if a store in a folder has no entries."""
    from backprompt.evaluation.archive import MIN_TOKENS
    from backprompt.store.opening import is_url

    if is_url(path):
        return
    with backprompt.DiskStore(path, persist="never") as store:
        if store.is_writable and not store.stats().num_entries:
            say(
                f"{path} has no entries: runs of fewer than {MIN_TOKENS} new tokens are not stored, and no run "
                "was longer"
            )


def shows_progress(arguments: argparse.Namespace) -> bool | None:
    """Return the value of `show_progress_bar`: the default if standard error is a terminal, else False."""
    return None if is_terminal() and not arguments.no_progress else False


def progress(
    arguments: argparse.Namespace, total: int | None, *, initial: int = 0, rows: Iterable[Any] | None = None
) -> Any:
    """Return a bar over prompts, on standard error."""
    is_shown = shows_progress(arguments) is not False
    return Bar(rows, total=total, initial=initial, unit=" prompts", disable=not is_shown)

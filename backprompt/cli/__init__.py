"""The command line: `backprompt`, and `python -m backprompt`.

Modules of this folder may import all other folders. They import torch only when a command runs, so that `--help` and
errors in options show at once.
A new command is a module with `add` and `run`, named in `__init__.py`; a shared option goes into `arguments.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from backprompt.arguments import did_you_mean
from backprompt.cli import demo, generate, reports, score, serve, stores
from backprompt.cli.arguments import say
from backprompt.cli.wording import in_options
from backprompt.errors import BackpromptError, CommandError
from backprompt.progress import Bar, is_terminal, showing
from backprompt.version import __version__
from backprompt.visible import visible

OK, CHECK_FAILED, BAD_INPUT, FAILED, INTERRUPTED, CLOSED = 0, 1, 2, 3, 130, 141

_COMMAND = "COMMAND"
_EXIT_CODES = f"""\
exit codes:
  {OK:<5}done
  {CHECK_FAILED:<5}a check failed: damaged entries, numbers beyond the tolerance, nothing found
  {BAD_INPUT:<5}wrong options, input that cannot be used, a model that cannot be loaded
  {FAILED:<5}another failure: no memory, no space, a bug
  {INTERRUPTED:<5}interrupted; the rows written so far stay
  {CLOSED:<5}the reader of the output has closed it

examples:
  backprompt demo
  backprompt score prompts.jsonl --completions labels.txt --model gpt2 -o out.jsonl
  backprompt generate prompts.csv --max-new-tokens 32 --model gpt2 -o out.csv
  backprompt serve --model gpt2 --store prompts.bp
  backprompt draw prompts.jsonl -o tree.svg
  backprompt store stat prompts.bp

`backprompt COMMAND --help` says more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Without `argv` the call is the program itself, so an interrupt ends the process by the signal.
    """
    arguments = argparse.Namespace()
    try:
        _parser().parse_args(argv, arguments)
        if sys.stdout is None and getattr(arguments, "output", "-") == "-":
            say("error: standard output is closed. Redirect it to a file, or to /dev/null if it is not needed.")
            return BAD_INPUT
        with _messages(arguments.verbose, has_bars=not arguments.no_progress and is_terminal()):
            code: int = arguments.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        resumable = getattr(arguments, "output", "-") != "-" and hasattr(arguments, "resume")
        say(f"interrupted{'; go on with --resume' if resumable else ''}")
        if argv is None:
            _end_by_interrupt()
        return INTERRUPTED
    except Exception as error:
        if _is_closed_pipe(error):
            if sys.stdout is not None:  # so that flushing at exit prints no error
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED
        if arguments.traceback:
            raise
        is_expected = isinstance(error, (BackpromptError, ValueError))
        say(f"error: {_in_a_line(error, with_kind=not is_expected)}")
        return BAD_INPUT if is_expected else FAILED


class _Parser(argparse.ArgumentParser):
    """A parser that prints errors in one line; commands have parsers of this class, too."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit; a call without any command gets the help."""
        if message.endswith(f"required: {_COMMAND}"):
            self.print_help(sys.stderr)
            self.exit(BAD_INPUT)
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        self.exit(BAD_INPUT, f"{self.prog}: error: {visible(message)} ({self.prog} --help says more)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and refuse unknown options at once: only the command's own parser can suggest similar options."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{did_you_mean(unknown[0].split('=')[0], known)}")
        return namespace, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="backprompt",
        description="Evaluate prompts with a causal language model, each distinct token once.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"backprompt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar=_COMMAND, required=True)
    for command in (demo, score, generate, serve, reports, stores):
        command.add(commands)
    return parser


def _end_by_interrupt() -> None:
    """End the process by the signal itself, which shells show as 130.

    A loop of a shell does not stop after a program that catches the interrupt and only exits with 130.
    """
    if os.name != "posix":
        return
    if sys.stdout is not None:
        with contextlib.suppress(OSError):  # the reader of standard error is gone, too
            sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _messages(verbose: int, *, has_bars: bool) -> Iterator[None]:
    """Send messages and bars to standard error for as long as the context lasts.

    Warnings are always shown, messages about the work with -v, all messages with -vv. Transformers' messages need -v.
    """
    import transformers

    level = {0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG)
    logger, handler = logging.getLogger("backprompt"), _Lines()
    before = (logger.level, transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    logger.addHandler(handler)
    logger.setLevel(level)
    transformers.logging.set_verbosity(logging.WARNING if verbose else logging.ERROR)
    if not has_bars:
        transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), showing(None if has_bars else False):
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        transformers.logging.set_verbosity(before[1])
        if before[2]:
            transformers.logging.enable_progress_bar()


class _Lines(logging.Handler):
    """Writes messages to the current standard error, one line each, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        if sys.stderr is not None:
            message = " ".join(record.getMessage().split())
            Bar.write(f"backprompt: {record.levelname.lower()}: {visible(message)}", file=sys.stderr)


def _in_a_line(error: BaseException, *, with_kind: bool) -> str:
    said = str(error) if isinstance(error, CommandError) else in_options(str(error))
    message = " ".join(said.split())
    if not with_kind:
        return message
    named = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{named} (--traceback shows where)"


def _is_closed_pipe(error: BaseException) -> bool:
    return isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno == errno.EPIPE)

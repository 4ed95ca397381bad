"""`backprompt store`: look into a folder of stored representations, check it, make it smaller. Loads no model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import backprompt
from backprompt.cli.arguments import add_command, say_if_empty, shows_progress
from backprompt.cli.rows import as_json
from backprompt.errors import CommandError
from backprompt.visible import beginning, counted, visible

if TYPE_CHECKING:
    from backprompt.store import DiskStore
    from backprompt.store.base import Header

_SHOWN_CHARACTERS = 60


def add(commands: Any) -> None:
    """Add the command, which has subcommands."""
    parser = commands.add_parser(
        "store",
        help="look into a folder of stored representations, check it, make it smaller",
        description="Look into a folder of stored representations, check it, make it smaller. No model is loaded.",
        allow_abbrev=False,
    )
    parts = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = _add(
        parts, "ls", "list the entries, in the order of their texts", run_list, "backprompt store ls prompts.bp"
    )
    listing.set_defaults(prefix="")
    _add(
        parts,
        "stat",
        "the number of entries, tokens and bytes",
        run_stat,
        "backprompt store stat prompts.bp --json",
    )
    finding = _add(
        parts,
        "find",
        "list the entries whose text begins with a prefix; exits with 1 if there is none",
        run_find,
        "backprompt store find prompts.bp 'Q: What'",
    )
    finding.add_argument("prefix", metavar="TEXT", help="the beginning of an entry's text")
    _add(
        parts,
        "verify",
        "read every entry and set damaged ones aside; exits with 1 if there are any",
        run_verify,
        "backprompt store verify prompts.bp",
    )
    pruning = _add(
        parts,
        "prune",
        "delete the least recently used entries until the rest fits",
        run_prune,
        "backprompt store prune prompts.bp '10 GB'",
    )
    pruning.add_argument("size", metavar="SIZE", help='the size that may stay: a number of bytes, or "10 GB"')


def _add(parts: Any, name: str, summary: str, run: Any, example: str) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    parser = add_command(parts, name, summary, description, run=run, examples=(example,))
    parser.add_argument("path", metavar="FOLDER", help="the folder of the store")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    return parser


def run_list(arguments: argparse.Namespace) -> int:
    """Print the entries."""
    with _opened(arguments) as store:
        _print_headers(store.list(arguments.prefix), is_json=arguments.json)
    return 0


def run_find(arguments: argparse.Namespace) -> int:
    """Print the entries whose text begins with the prefix."""
    with _opened(arguments) as store:
        return 0 if _print_headers(store.list(arguments.prefix), is_json=arguments.json) else 1


def run_stat(arguments: argparse.Namespace) -> int:
    """Print how much is stored."""
    with _opened(arguments) as store:
        stats = store.stats()
    if arguments.json:
        print(as_json({**vars(stats), "path": str(store.path), "is_writable": store.is_writable}))
        return 0
    say_if_empty(arguments.path)
    print(f"entries          {stats.num_entries:,}")
    print(f"tokens           {stats.num_tokens:,}")
    print(f"bytes            {stats.num_bytes:,}")
    print(f"largest error    {stats.largest_error:.3g}")
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Print the names of damaged entries."""
    with _opened(arguments) as store:
        num_entries = store.stats().num_entries
        damaged = store.verify(show_progress_bar=shows_progress(arguments))
    if arguments.json:
        print(as_json({"num_entries": num_entries, "damaged": list(damaged)}))
    else:
        for name in damaged:
            print(visible(name))
        sound = counted(num_entries - len(damaged), "entry is", "entries are")
        print(f"{sound} sound, {len(damaged):,} damaged.", file=sys.stderr)
    return 1 if damaged else 0


def run_prune(arguments: argparse.Namespace) -> int:
    """Delete entries, and print their number."""
    from backprompt.memory.budget import parse_bytes

    size = arguments.size
    max_bytes = parse_bytes(int(size) if size.isdecimal() else size, "SIZE")
    with _opened(arguments) as store:
        if not store.is_writable:
            raise CommandError(f"{store.path} cannot be written to.")
        deleted = store.prune(max_bytes, show_progress_bar=shows_progress(arguments))
        stats = store.stats()
    if arguments.json:
        print(as_json({"deleted": list(deleted), **vars(stats)}))
    else:
        gone, left = counted(len(deleted), "entry", "entries"), counted(stats.num_entries, "is", "are")
        print(f"{gone} deleted; {left} left, of {stats.num_bytes:,} bytes.")
    return 0


def _opened(arguments: argparse.Namespace) -> DiskStore:
    """Open an existing store; a folder that is not a store is refused, and stays as it is."""
    from backprompt.store.opening import is_url
    from backprompt.store.paths import FOLDERS, check_folder

    if is_url(arguments.path):
        raise CommandError(
            f"This command looks into folders, and {arguments.path} is a bucket: backprompt.ObjectStore(url).list() "
            "yields its entries."
        )
    try:
        folder = check_folder(arguments.path)
        if not (folder / FOLDERS[0]).is_dir():
            raise CommandError(f"{arguments.path} is not a store: it has no folder {FOLDERS[0]!r}.")
        return backprompt.DiskStore(folder, persist="never")
    except OSError as error:
        raise CommandError(str(error)) from error


def _print_headers(headers: Iterable[Header], *, is_json: bool) -> int:
    """Print entries, one line each, and return their number."""
    num_headers = 0
    for header in headers:
        print(as_json(_described(header)) if is_json else visible(_line(header)))
        num_headers += 1
    return num_headers


def _described(header: Header) -> dict[str, Any]:
    return {
        "name": header.name,
        "position": header.position,
        "num_tokens": len(header.token_ids),
        "text": header.text.encode(errors="replace").decode(),
        "model": header.model,
        "tokenizer": header.tokenizer,
        "dtype": header.dtype,
        "exactness": header.exactness,
        "error": header.error,
    }


def _line(header: Header) -> str:
    text = beginning(as_json(header.text.encode(errors="replace").decode()), _SHOWN_CHARACTERS, end='..."')
    where = f"{header.position}..{header.position + len(header.token_ids) - 1}"
    dtype = header.dtype.removeprefix("torch.")
    kind = dtype if header.exactness == "exact" else f"{dtype} as {header.exactness}"
    return (
        f"{header.name[:8]}  {len(header.token_ids):>7,} tokens  {where:>13}  model {header.model[:8]}  {kind}  {text}"
    )

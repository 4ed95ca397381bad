"""`backprompt explain` and `verify`: what evaluating prompts takes, and how close its numbers are to plain calls."""

from __future__ import annotations

import argparse
import json
from typing import Any

from backprompt._explain import explain
from backprompt.cli.arguments import (
    add_command,
    add_input_arguments,
    add_model_arguments,
    bound,
    check_model_arguments,
    load_model,
    read_completions,
    read_input,
)
from backprompt.cli.rows import Row
from backprompt.errors import CommandError
from backprompt.lm import LM
from backprompt.text import Text


def add(commands: Any) -> None:
    """Add the commands."""
    parser = add_command(
        commands,
        "explain",
        "what evaluating prompts takes: tokens, passes, bytes, and whether sharing pays",
        """Say what evaluating prompts takes, as a database explains a query: tokens in all strings, distinct ones, what
        a store has of them, passes, bytes; where prompts stop having a common beginning, and whether sharing pays.

        Nothing is computed, unless --run asks for it; then what was done stands beside what was expected.""",
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


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the prompts, and what may follow each of them."""
    add_input_arguments(parser)
    parser.add_argument(
        "--completions", metavar="FILE", help="take each prompt with each of these behind it, after a space"
    )


def read_texts(arguments: argparse.Namespace, rows: list[Row], lm: LM | None) -> list[Text]:
    """Return the texts of rows, with completions behind them if there are any."""
    prompts = [bound(row, lm) for row in rows]
    if arguments.completions is None:
        return prompts
    completions = read_completions(arguments.completions)
    return [prompt + f" {completion}" for prompt in prompts for completion in completions]


def read_rows(arguments: argparse.Namespace) -> list[Row]:
    """Return all rows of the input; raises for what can be seen to be wrong without a model."""
    if getattr(arguments, "model", None) is not None:
        check_model_arguments(arguments)
    if arguments.completions is not None and not read_completions(arguments.completions):
        raise CommandError(f"{arguments.completions} has no completions.")
    given = read_input(arguments)
    rows = list(given.rows())
    if not rows:
        raise CommandError(f"{given.name} has no rows.")
    return rows


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the account."""
    rows = read_rows(arguments)
    lm = load_model(arguments)
    explained = explain(read_texts(arguments, rows, lm), analyze=arguments.is_run)
    if arguments.json:
        print(json.dumps(explained.to_dict(), ensure_ascii=False))
    else:
        explained.show()
    return 0

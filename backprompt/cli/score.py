"""`backprompt score`: the probability of each given completion behind each prompt, and the most probable one."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import backprompt
from backprompt.cli.arguments import (
    ENDS_OF_PROMPT,
    add_command,
    add_end_of_prompt,
    add_input_arguments,
    add_model_arguments,
    finite,
    read_completions,
    read_text,
)
from backprompt.cli.stream import Compute, Job, add_output_arguments, positive, stream
from backprompt.errors import CommandError
from backprompt.text.node import Text

if TYPE_CHECKING:
    from backprompt.lm import LM

AGGREGATES = ("mean", "sum")
"""The aggregates of `backprompt.classify`, repeated because that package imports torch."""
SEARCHES = ("exhaustive", "best-first")

NEW_FIELDS = ("prediction", "probability", "probabilities")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "score",
        "the probability of given completions behind each prompt: classification",
        """Compute the probability of each completion behind each prompt. Parts that prompts share are computed once.

        Each row of the input becomes one of the output, with the fields "prediction" (the most probable completion),
        "probability" (its own) and "probabilities" (of all completions, or of the --top ones, the most probable first);
        in CSV "probabilities" is JSON.""",
        run=run,
        examples=(
            "backprompt score prompts.jsonl --completions labels.txt --model gpt2 -o out.jsonl",
            "backprompt score prompts.jsonl --completions labels.txt --model gpt2 -o out.jsonl --resume",
            "cat reviews.csv | backprompt score - --input-format csv --column review --completions labels.txt \\",
            "    --model gpt2 | jq -r .prediction",
        ),
    )
    add_input_arguments(parser)
    group = parser.add_argument_group("scoring")
    group.add_argument(
        "--completions",
        required=True,
        metavar="FILE",
        help="the completions: a file, one a line, or a JSON list of strings in a file .json; or a list here: "
        "negative,positive",
    )
    group.add_argument(
        "--prior",
        metavar="P",
        help="a prior probability for each completion: numbers with commas, or a file, one a line",
    )
    group.add_argument(
        "--aggregate",
        choices=AGGREGATES,
        default="mean",
        help="a completion's log-probability: the mean of its tokens', or their sum (default: %(default)s)",
    )
    group.add_argument("--top", type=positive, metavar="K", help="write the K most probable completions only")
    group.add_argument("--no-normalize", action="store_true", help="do not normalize probabilities to sum to one")
    group.add_argument(
        "--discount-completions",
        type=finite,
        default=0.0,
        metavar="X",
        help="add X times the log-probability of a completion alone; a negative X works against completions that "
        "are probable anywhere",
    )
    group.add_argument(
        "--neutral-prompt",
        metavar="TEXT",
        help='divide by the probability of a completion behind this prompt, such as "N/A"',
    )
    add_end_of_prompt(group)
    group.add_argument(
        "--search",
        choices=SEARCHES,
        default="exhaustive",
        help="best-first: find the most probable completion without scoring completions that cannot win, and write "
        '"prediction" alone; for hundreds of completions (default: %(default)s)',
    )
    add_output_arguments(parser)
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Score all of the input."""
    completions = read_completions(arguments.completions, arguments.encoding)
    options: dict[str, Any] = {
        "prior": None if arguments.prior is None else _prior(arguments.prior),
        "normalize": not arguments.no_normalize,
        "end_of_prompt": ENDS_OF_PROMPT[arguments.end_of_prompt],
    }
    backprompt.classify.Example("checks what can be checked without a model", completions, **options)
    options |= {
        "aggregate": arguments.aggregate,
        "discount_completions": arguments.discount_completions,
        "neutral_prompt": arguments.neutral_prompt or None,
    }
    if arguments.search == "best-first":
        return _search(arguments, completions, options)
    num_kept = len(completions) if arguments.top is None else min(arguments.top, len(completions))

    def computed_with(lm: LM) -> Compute:
        def compute(prompts: Sequence[Text]) -> list[list[dict[str, Any]]]:
            found = backprompt.classify.predict_proba(prompts, completions, lm, show_progress_bar=False, **options)
            return [[_result(completions, probabilities.tolist(), num_kept)] for probabilities in found]

        return compute

    def check_written(fields: Mapping[str, Any]) -> str | None:
        written = fields["probabilities"]
        names = set(json.loads(written) if isinstance(written, str) else written)
        return None if names <= set(completions) and len(names) == num_kept else "has other completions"

    compared = _compared(arguments, completions, options)
    return stream(arguments, Job(NEW_FIELDS, computed_with, compared, check_written=check_written))


def _search(arguments: argparse.Namespace, completions: list[str], options: dict[str, Any]) -> int:
    """Find the most probable completion behind each prompt, without the probabilities of all completions."""
    if arguments.top is not None or arguments.no_normalize:
        raise CommandError(
            "--search best-first finds the most probable completion and no probabilities: leave --top and "
            "--no-normalize out."
        )

    def computed_with(lm: LM) -> Compute:
        def compute(prompts: Sequence[Text]) -> list[list[dict[str, Any]]]:
            found = backprompt.classify.predict(
                prompts, completions, lm, search="best-first", show_progress_bar=False, **options
            )
            return [[{"prediction": best}] for best in found]

        return compute

    def check_written(fields: Mapping[str, Any]) -> str | None:
        return None if fields["prediction"] in completions else "has another completion"

    compared = _compared(arguments, completions, options)
    return stream(arguments, Job(NEW_FIELDS[:1], computed_with, compared, check_written=check_written))


def _compared(arguments: argparse.Namespace, completions: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the results depend on."""
    names = ("aggregate", "top", "no_normalize", "discount_completions", "neutral_prompt", "end_of_prompt", "search")
    return {"completions": list(completions), "prior": options["prior"]} | {
        name: getattr(arguments, name) for name in names
    }


def _result(completions: Sequence[str], probabilities: Sequence[float], num_kept: int) -> dict[str, Any]:
    order = sorted(range(len(completions)), key=lambda idx: -probabilities[idx])[
        :num_kept
    ]  # a stable sort: of equal completions the first is first
    ranked = {completions[idx]: probabilities[idx] for idx in order}
    best = next(iter(ranked))
    return {"prediction": best, "probability": ranked[best], "probabilities": ranked}


def _prior(given: str) -> list[float]:
    try:
        return [float(number) for number in given.split(",")]
    except ValueError as error:
        if not os.path.exists(given):
            raise CommandError(
                f"--prior {given}: no such file. Name a file, or give a number for each completion: 0.3,0.7."
            ) from error
    lines = read_text(given).split()
    try:
        return [float(number) for number in lines]
    except ValueError as error:
        raise CommandError(f"--prior {given}: {error}.") from error

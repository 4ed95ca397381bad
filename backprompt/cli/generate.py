"""`backprompt generate`: let the model continue each prompt."""

from __future__ import annotations

import argparse
import json
import math
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import backprompt
from backprompt.cli.arguments import add_command, add_input_arguments, add_model_arguments, finite
from backprompt.cli.prompts import unescaped
from backprompt.cli.stream import Compute, Job, add_output_arguments, not_negative, positive, stream
from backprompt.errors import CommandError
from backprompt.text.node import Text

if TYPE_CHECKING:
    from backprompt.generation.continued import GeneratedText
    from backprompt.lm import LM
    from backprompt.tokens.constraints import JsonSchema, Regex

_OWN_OPTIONS = ("max_new_tokens", "n", "stop", "include_stop", "seed")
NEW_FIELDS = ("completion", "finish_reason", "num_new_tokens", "logprob")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "generate",
        "let the model continue each prompt",
        """Continue each prompt, greedily unless sampling is asked for. Parts that prompts share are computed once,
        and all prompts of a slice run together.

        Each row of the input becomes one of the output, or N rows with --n, with the fields "completion",
        "finish_reason" ("eos", "stop", "constraint", "length"), "num_new_tokens" and "logprob" (of these tokens, nats);
        with --n also "sample", from 0 on. A sample depends on the seed, the prompt and the number of the sample, not on
        other rows; so equal prompts have equal samples.""",
        run=run,
        examples=(
            "backprompt generate prompts.jsonl --max-new-tokens 32 --model gpt2 -o out.jsonl",
            "backprompt generate questions.csv --column question --max-new-tokens 64 --stop '\\n' --model gpt2",
            "backprompt generate prompts.jsonl --max-new-tokens 32 --n 4 --temperature 0.8 --seed 1 --model gpt2",
        ),
    )
    add_input_arguments(parser)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens", type=positive, required=True, metavar="N", help="the largest number of tokens to add"
    )
    group.add_argument("--n", type=positive, metavar="N", help="the number of samples of each prompt")
    group.add_argument(
        "--stop",
        action="append",
        type=_unescaped,
        metavar="TEXT",
        help="end a completion before this string; may be given more than once; \\n, \\t and \\\\ are escapes as in C",
    )
    group.add_argument(
        "--include-stop", action="store_true", help="keep the string of --stop at the end of the completion"
    )
    constraint = group.add_mutually_exclusive_group()
    constraint.add_argument(
        "--regex",
        dest="constraint",
        type=_regex,
        metavar="PATTERN",
        help="a regular expression that each completion must match (needs llguidance)",
    )
    constraint.add_argument(
        "--json-schema",
        dest="constraint",
        type=_json_schema,
        metavar="FILE",
        help="a schema: each completion must be JSON that is valid under it (needs llguidance)",
    )
    group.add_argument("--seed", type=not_negative, help="the seed of sampling (default: a new one each time)")
    group.add_argument(
        "--do-sample",
        action="store_true",
        default=None,
        help="sample; each of the next three options turns sampling on, too",
    )
    group.add_argument("--temperature", type=finite)
    group.add_argument("--top-p", type=finite)
    group.add_argument("--top-k", type=int)
    group.add_argument(
        "--option",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="another field of transformers' GenerationConfig, its value as JSON: repetition_penalty=1.2",
    )
    add_output_arguments(parser)
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Continue all of the input."""
    from backprompt.generation.constrained import constraints_of
    from backprompt.generation.decoding import Decoding
    from backprompt.generation.options import SAMPLING_FIELDS
    from backprompt.generation.stops import StopStrings

    named = {name: getattr(arguments, name) for name in ("do_sample", "temperature", "top_p", "top_k")}
    config = {name: value for name, value in named.items() if value is not None}
    for name, value in arguments.option:
        if name in config or name in (*_OWN_OPTIONS, "constraint"):
            own = "--regex or --json-schema" if name == "constraint" else f"--{name.replace('_', '-')}"
            raise CommandError(f"--option {name}: generate has {own} for that. Give it once, as {own}.")
        config[name] = value
    if (arguments.n or 1) > 1 and not any(config.get(name) for name in ("do_sample", "num_beams", *SAMPLING_FIELDS)):
        raise CommandError(
            f"Greedy decoding gives one continuation, not {arguments.n}. Ask for sampling: --do-sample, --temperature."
        )
    seed = secrets.randbits(63) if arguments.seed is None else arguments.seed  # one seed for all slices

    def computed_with(lm: LM) -> Compute:
        stops = StopStrings(arguments.stop, lm.tokenizer, include_stop=arguments.include_stop)
        Decoding(  # checks the options
            lm.session.causal_lm,
            lm.tokenizer,
            max_new_tokens=arguments.max_new_tokens,
            stops=stops,
            seed=seed,
            given=config,
            constraints=constraints_of(lm, arguments.constraint, 1),
        )

        def compute(prompts: Sequence[Text]) -> list[list[dict[str, Any]]]:
            distinct = {prompt.tokens: prompt for prompt in prompts}  # samples must not depend on how slices are cut
            found = backprompt.generate(
                distinct.values(),
                max_new_tokens=arguments.max_new_tokens,
                n=arguments.n or 1,
                stop=arguments.stop,
                include_stop=arguments.include_stop,
                seed=seed,
                constraint=arguments.constraint,
                show_progress_bar=False,
                **config,
            )
            results = {
                token_ids: [result_of(text, idx, arguments.n) for idx, text in enumerate(samples)]
                for token_ids, samples in zip(distinct, found, strict=True)
            }
            return [results[prompt.tokens] for prompt in prompts]

        return compute

    new_fields = NEW_FIELDS if arguments.n is None else (*NEW_FIELDS, "sample")
    compared = {name: getattr(arguments, name) for name in (*_OWN_OPTIONS, *named)}
    compared |= {"option": dict(arguments.option), **_named(arguments.constraint)}
    return stream(arguments, Job(new_fields, computed_with, compared, rows_per_prompt=arguments.n or 1))


def result_of(text: GeneratedText, sample_idx: int, num_samples: int | None) -> dict[str, Any]:
    """Return the fields that one continuation adds to a row."""
    logprob = float(text.completion_logprobs.double().sum())
    fields = {
        "completion": text.completion,
        "finish_reason": text.finish_reason,
        "num_new_tokens": len(text.completion_tokens),
        "logprob": logprob if math.isfinite(logprob) else None,  # JSON has no -inf
    }
    return fields if num_samples is None else {**fields, "sample": sample_idx}


def _unescaped(given: str) -> str:
    """Return a string with escapes replaced, since line breaks are hard to write in most shells."""
    if not given:
        raise argparse.ArgumentTypeError("the string must not be empty")
    return unescaped(given)


def _regex(given: str) -> Regex:
    from backprompt.tokens.constraints import Regex

    return Regex(given)


def _json_schema(given: str) -> JsonSchema:
    from backprompt.tokens.constraints import JsonSchema

    try:
        with open(given, encoding="utf-8-sig") as file:
            schema = json.load(file)
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{given} cannot be read as JSON: {error}") from error
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{given} must hold a JSON schema, an object, not {json.dumps(schema)[:60]}")
    return JsonSchema(schema)


def _named(constraint: Regex | JsonSchema | None) -> dict[str, str | None]:
    """Return the values of the options for constraints, by name; None for an option that is not given."""
    return {"regex": getattr(constraint, "pattern", None), "json_schema": getattr(constraint, "json", None)}


def _option(given: str) -> tuple[str, Any]:
    name, _, value = given.partition("=")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given}: the value must be JSON, as in repetition_penalty=1.2") from error

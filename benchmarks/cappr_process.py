"""CAPPr in a process and an environment of its own: `CAPPR_PYTHON -m benchmarks.cappr_process FOLDER`.

Loads the model and the tokenizer in FOLDER, says so in a line, and then answers each line of its input, a request, with
a line; both are JSON. It imports nothing of backprompt, and runs with the versions that CAPPr 0.9.6 needs.

A request has `prompts`, each with `parts` that a space joins and `completions`, and a `setting`: whether what prompts
share is cached with CAPPr's `cache`, and CAPPr's `batch_size` and `batch_size_completions`. With `trace_memory` peak
memory is measured instead of seconds. The answer has the log-probability of each completion's tokens, prompt by prompt.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from cappr import Example
from cappr.huggingface import classify
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.measure import peak_bytes_of, seconds_of

Prompt = dict[str, Any]
Scores = list[list[list[float]]]


def log_probs(pair: tuple[Any, Any], prompts: list[Prompt], setting: dict[str, Any]) -> Scores:
    """The log-probabilities of each completion's tokens, in the order of `prompts`."""
    if setting["cached"]:
        return _below_caches(pair, prompts, setting, depth=0)
    whole = [{"parts": [" ".join(prompt["parts"])], "completions": prompt["completions"]} for prompt in prompts]
    return _scored(pair, whole, setting)


def _below_caches(pair: tuple[Any, Any], prompts: list[Prompt], setting: dict[str, Any], depth: int) -> Scores:
    """Prompts that share `depth` parts, which `pair` has cached; all have as many parts."""
    if len(prompts[0]["parts"]) == depth + 1:
        return _scored(pair, prompts, setting)
    by_part: dict[str, list[int]] = {}
    for idx, prompt in enumerate(prompts):
        by_part.setdefault(prompt["parts"][depth], []).append(idx)
    scores: dict[int, list[list[float]]] = {}
    for part, indices in by_part.items():
        space = " " if depth else ""  # CAPPr puts one before prompts, but not before what is cached
        with classify.cache(pair, space + part) as cached:
            found = _below_caches(cached, [prompts[idx] for idx in indices], setting, depth + 1)
        scores.update(zip(indices, found))  # noqa: B905
    return [scores[idx] for idx in range(len(prompts))]


def _scored(pair: tuple[Any, Any], prompts: list[Prompt], setting: dict[str, Any]) -> Scores:
    sizes = {
        "batch_size": setting["batch_size"],
        "batch_size_completions": setting["batch_size_completions"],
        "show_progress_bar": False,
    }
    strings = [prompt["parts"][-1] for prompt in prompts]
    completions = [prompt["completions"] for prompt in prompts]
    if all(own == completions[0] for own in completions):
        return classify.log_probs_conditional(strings, completions[0], pair, **sizes)
    examples = [Example(string, own) for string, own in zip(strings, completions)]  # noqa: B905
    return classify.log_probs_conditional_examples(examples, pair, **sizes)


def main() -> None:
    folder, answers = Path(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr  # nothing else may stand between the answers
    transformers.logging.set_verbosity_error()
    special = json.loads((folder / "special.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), model_input_names=["input_ids", "attention_mask"], **special
    )
    model = GPT2LMHeadModel.from_pretrained(folder, torch_dtype=torch.float32).eval()

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    versions = {name: version(name) for name in ("cappr", "transformers", "torch", "numpy")}
    answer({"versions": versions, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        request = json.loads(line)
        scores: list[Scores] = []
        run = lambda: scores.append(log_probs((model, tokenizer), request["prompts"], request["setting"]))  # noqa: B023, E731
        measured = {"peak_bytes": peak_bytes_of(run)} if request["trace_memory"] else {"seconds": seconds_of(run)}
        answer({"scores": scores[0] if scores else None, **measured})


if __name__ == "__main__":
    main()

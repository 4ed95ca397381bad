"""A `VllmLM` in a process and an environment of its own: `VLLM_PYTHON -m benchmarks.vllm_lm_process FOLDER`.

Loads the model and the tokenizer in FOLDER, says so in a line, and then answers each line of its input, a request, with
a line; both are JSON. A request has `prompts`, each a string with its completions, and `is_whole`: whether vLLM is
called as its documentation says, with `prompt_logprobs` of every text, instead of through `VllmLM`. The answer has the
log-probability of each completion's tokens, prompt by prompt, the number of forwarded tokens, and the seconds of the
processor on one thread, with an empty prefix cache.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # other output must not stand between the answers

import torch  # noqa: E402
import transformers  # noqa: E402
import vllm  # noqa: E402

from backprompt import Text, classify  # noqa: E402
from backprompt.engines.vllm import VllmLM  # noqa: E402
from benchmarks.measure import cpu_seconds_of  # noqa: E402

Prompts = list[tuple[str, list[str]]]


def through_lm(lm: VllmLM, prompts: Prompts) -> list[list[list[float]]]:
    return classify.log_probs([classify.Example(*prompt, end_of_prompt="") for prompt in prompts], lm=lm)


def whole(lm: VllmLM, prompts: Prompts) -> list[list[list[float]]]:
    """The log-probabilities of whole texts; ids are made as `VllmLM` makes them."""
    starts = [len(Text(string, lm).tokens) for string, _ in prompts]
    ids = [
        [[*Text(string, lm).tokens, *lm.session.completion_ids([completion])[0]] for completion in completions]
        for string, completions in prompts
    ]
    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    asked = [{"prompt_token_ids": text} for texts in ids for text in texts]
    found = iter(lm.llm.generate(asked, params, use_tqdm=False))
    return [
        [
            [row[text[idx]].logprob for idx, row in enumerate(next(found).prompt_logprobs) if idx >= start]
            for text in own
        ]
        for own, start in zip(ids, starts, strict=True)
    ]


def main() -> None:
    lm = VllmLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, max_num_batched_tokens=4096)

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    answer({"versions": versions, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        request = json.loads(line)
        lm.clear()
        before, found = lm.stats.tokens_computed, []
        score = whole if request["is_whole"] else through_lm
        seconds = cpu_seconds_of(lambda: found.extend(score(lm, request["prompts"])))  # noqa: B023
        answer({"scores": found, "seconds": seconds, "computed": lm.stats.tokens_computed - before})


if __name__ == "__main__":
    main()

"""vLLM in a process and an environment of its own: `VLLM_PYTHON -m benchmarks.vllm_process FOLDER`.

Loads the model in FOLDER, says so in a line, and then answers each line of its input, a request, with a line; both are
JSON. It imports nothing of backprompt. A request has `prompts`, token ids, and `max_new_tokens`; the answer has the
greedy continuations and the seconds that they took, with an empty prefix cache.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # other output must not stand between the answers

import torch  # noqa: E402
import vllm  # noqa: E402

from benchmarks.measure import seconds_of  # noqa: E402


def main() -> None:
    llm = vllm.LLM(
        model=sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=True,
        max_model_len=1024,
        max_num_batched_tokens=4096,
    )

    def answer(found: dict) -> None:
        print(json.dumps(found), file=answers, flush=True)

    answer({"versions": {"vllm": vllm.__version__, "torch": torch.__version__}, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=request["max_new_tokens"], ignore_eos=True, detokenize=False
        )
        found: list = []
        assert llm.reset_prefix_cache()
        seconds = seconds_of(lambda: found.extend(llm.generate(prompts, sampling, use_tqdm=False)))  # noqa: B023
        answer({"completions": [list(one.outputs[0].token_ids) for one in found], "seconds": seconds})


if __name__ == "__main__":
    main()

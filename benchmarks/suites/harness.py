"""lm-evaluation-harness on 8-shot multiple choice: the model type `backprompt` against the harness's own `hf`.

Both run whole tasks through `lm_eval.simple_evaluate` in one process, on local files, with models that are loaded and
warm. `hf` runs with the batch size that is the fastest on a sample.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, with_range
from benchmarks.workloads import Writer

NUM_QUESTIONS = 60
NUM_SHOTS = 8
BATCH_SIZES = (1, 4, 16)
"""For hf. Its "auto" ends at such a size, too, after five more batches to find it."""
SAMPLE_QUESTIONS = 4
ROUNDS = 3
MAX_GAP = 1e-3  # nats, of a request's log-likelihood
TASKS = {
    "bench_words": "4 answers of 1 to 3 words",
    "bench_letters": "4 letters, a token each",
}


@dataclass(frozen=True)
class Tokens:
    """Tokens forwarded, padding included."""

    hf: int
    backprompt: int


@dataclass(frozen=True)
class Seconds:
    hf: float
    backprompt: Spread


@dataclass(frozen=True)
class Line:
    """A task, run as a whole with both model types."""

    task: str
    questions: int
    requests: int
    tokens_in_all_requests: Annotated[int, Key("tokens in all requests")]
    tokens: Tokens
    seconds: Seconds
    batch_size: Annotated[int, Key("batch size")]  # of hf
    seconds_of_a_sample: Annotated[dict[str, float], Key("seconds of a sample")]  # by hf's batch size
    gap: float
    accuracy: float


class Harness(Suite):
    """A line a task."""

    name = "lm-eval"
    place = 70
    rows_type = list[Line]

    def measure(self, say: Say, peer_python: Path | None) -> Measured:
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        from backprompt.integrations.lm_eval import BackpromptLM

        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        with tempfile.TemporaryDirectory(prefix="backprompt-bench-") as folder:
            path = Path(folder)
            workloads.make_model().save_pretrained(path / "model")
            workloads.make_tokenizer().save_pretrained(path / "model")
            _write_tasks(path)
            tasks = TaskManager(include_path=folder, include_defaults=False)
            hf = HFLM(pretrained=str(path / "model"), device="cpu")
            ours = BackpromptLM(str(path / "model"), device="cpu")
            lines = []
            for name in TASKS:
                lines.append(_compare(hf, ours, name, tasks))
                say(json.dumps(as_json(lines[-1])))
            return Measured(lines, describe_machine(ours.lm))

    def tables(self, results: Results) -> list[Table]:
        return [Table("table harness", harness_table(self.rows(results)))]


def _compare(hf: Any, ours: Any, task: str, tasks: Any) -> Line:
    samples = {}
    for size in BATCH_SIZES:
        hf.batch_size_per_gpu = size
        samples[size] = _run(hf, task, tasks, limit=SAMPLE_QUESTIONS)[0]
    hf.batch_size_per_gpu = best = min(samples, key=samples.__getitem__)
    hf_tokens = _count_tokens(hf)
    hf_seconds, expected = _run(hf, task, tasks)
    seconds = []
    for _ in range(ROUNDS):
        ours.lm.clear()
        before = ours.lm.stats
        own_seconds, found = _run(ours, task, tasks)
        seconds.append(own_seconds)
        done = ours.lm.stats - before
    return Line(
        task=TASKS[task],
        questions=NUM_QUESTIONS,
        requests=4 * NUM_QUESTIONS,
        tokens_in_all_requests=done.tokens_requested,
        tokens=Tokens(sum(hf_tokens), done.tokens_computed),
        seconds=Seconds(hf_seconds, Spread.of(seconds)),
        batch_size=best,
        seconds_of_a_sample={str(size): value for size, value in samples.items()},
        gap=_gap(found, expected, task),
        accuracy=found["results"][task]["acc,none"],
    )


def _run(model: Any, task: str, tasks: Any, limit: int | None = None) -> tuple[float, dict[str, Any]]:
    """Seconds of a whole task, from its documents to its accuracy, and the results."""
    import lm_eval

    started = time.perf_counter()
    results = lm_eval.simple_evaluate(model, tasks=[task], task_manager=tasks, limit=limit, bootstrap_iters=0)
    return time.perf_counter() - started, results


def _count_tokens(hf: Any) -> list[int]:
    """The tokens of each call of the model from now on, padding included."""
    counts: list[int] = []
    hf.model.register_forward_pre_hook(lambda _, args: counts.append(args[0].numel()))
    return counts


def _gap(found: dict[str, Any], expected: dict[str, Any], task: str) -> float:
    """The largest difference of two log-likelihoods; anything else must be the same."""
    gap = 0.0
    for sample, other in zip(found["samples"][task], expected["samples"][task], strict=True):
        assert sample["arguments"] == other["arguments"]
        for (logprob, is_greedy), (other_logprob, is_other_greedy) in zip(
            sample["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert is_greedy == is_other_greedy, sample
            gap = max(gap, abs(logprob - other_logprob))
    assert gap < MAX_GAP, gap
    assert found["results"][task]["acc,none"] == expected["results"][task]["acc,none"]
    return gap


def _write_tasks(folder: Path) -> None:
    writer = Writer(11)
    documents = [
        {"question": writer.text(20), "choices": [label.strip() for label in writer.labels(4)], "answer": idx % 4}
        for idx in range(NUM_SHOTS + NUM_QUESTIONS)
    ]
    for split, part in (("shots", documents[:NUM_SHOTS]), ("questions", documents[NUM_SHOTS:])):
        (folder / f"{split}.json").write_text(json.dumps(part), encoding="utf-8")
    letters = "{{question}}\n{% for choice in choices %}{{'ABCD'[loop.index0]}}. {{choice}}\n{% endfor %}"
    options: dict[str, dict[str, Any]] = {
        "bench_words": {"doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}"},
        "bench_letters": {  # behind a parenthesis, where this tokenizer has a token for each letter
            "doc_to_text": letters + "Answer: (",
            "doc_to_choice": list("ABCD"),
            "target_delimiter": "",
            "fewshot_delimiter": ")\n\n",
        },
    }
    for name in TASKS:
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{split}.json") for split in ("shots", "questions")},
                "cache_dir": str(folder / "datasets"),
            },
            "output_type": "multiple_choice",
            "test_split": "questions",
            "fewshot_split": "shots",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": NUM_SHOTS,
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            **options[name],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def harness_table(lines: list[Line]) -> str:
    headings = [
        "8 shots",
        "requests",
        "tokens in all of them",
        "tokens, `hf`",
        "tokens, `backprompt`",
        "seconds, `hf` (batch size)",
        "seconds, `backprompt` (lowest to highest)",
        "times faster",
    ]
    rows = [
        [
            f"{line.questions} questions, {line.task}",
            f"{line.requests:,}",
            f"{line.tokens_in_all_requests:,}",
            f"{line.tokens.hf:,}",
            f"{line.tokens.backprompt:,}",
            f"{line.seconds.hf:.1f} ({line.batch_size})",
            with_range(line.seconds.backprompt, 1),
            f"{line.seconds.hf / line.seconds.backprompt.median:.0f}",
        ]
        for line in lines
    ]
    return markdown(headings, rows)


SUITE = Harness()

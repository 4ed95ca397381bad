"""Weights of fewer bits on the CPU: seconds, bytes, the distance from float32, and the accuracy of the demo.

The trained demo model sorts the questions of `examples/intents.py`. GPT-2 with random weights scores made-up texts.
Both also continue prompts. One thread is measured by its own time on the processor, all ways in turns, so that other
work on the machine decides little. Where a package is missing, its way is left out.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from backprompt import LM, Text, generate, load, verify
from backprompt.model import int8
from benchmarks import workloads
from benchmarks.machine import describe_machine
from benchmarks.measure import Spread
from benchmarks.rows import Key, as_json
from benchmarks.suite import Measured, Results, Say, Suite
from benchmarks.tables import Table, markdown, megabytes, with_range
from benchmarks.workloads import Writer

FULL = "float32"
ROUNDS = 3
NUM_PROMPTS, NEW_TOKENS = 4, 12
TIMED_QUESTIONS = 10
"""The demo's accuracy is that of all questions."""
COMPARED = 6
"""Texts that are compared token by token with float32."""
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
BIT_FEATURES = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


@dataclass(frozen=True)
class Row:
    """One way to hold the weights of one model."""

    model: str
    weights: str
    linears: str
    scoring: Spread  # seconds, in parts of those of float32
    generation: Spread
    weight_bytes: Annotated[int, Key("bytes of weights")]
    copied_bytes: Annotated[int, Key("bytes of copies")]
    gap: float  # against float32, at tokens that matter, nats
    largest_gap: Annotated[float, Key("largest gap")]
    mean_gap: Annotated[float, Key("mean gap")]
    flips: int
    tokens: int
    right: int | None
    questions: int | None


@dataclass(frozen=True)
class Job:
    """What a model is measured with."""

    texts: Callable[[LM], list[Text]]
    num_right: Callable[[LM], int] | None
    num_questions: int | None


class Bits(Suite):
    name = "bits"
    place = 95
    rows_type = list[Row]

    def measure(self, say: Say, peer_python: Path | None) -> Measured | None:
        if importlib.util.find_spec(int8.PACKAGE) is None:
            say("bits is not measured: it needs torchao (pip install torchao).")
            return None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            rows = []
            for name, ways, job in (_demo(), _random_gpt2()):
                lms = {way: make() for way, make in ways.items()}
                machine = describe_machine(lms[FULL]) | {"torchao": int8.version(), "instructions": _instructions()}
                for row in _rows(name, lms, job):
                    rows.append(row)
                    say(json.dumps(as_json(row)))
                del lms
                gc.collect()
        finally:
            torch.set_num_threads(threads)
        return Measured(rows, machine)

    def tables(self, results: Results) -> list[Table]:
        return [Table("table bits", _table(self.rows(results)))]


def _demo() -> tuple[str, dict[str, Callable[[], LM]], Job]:
    sys.path.append(str(EXAMPLES))
    import intents

    from demo_model import demo_model_folder

    folder = demo_model_folder()
    questions = intents.read_questions(intents.DATA / "questions.tsv")

    def texts(lm: LM) -> list[Text]:
        return intents.build_tree(lm, intents.SHOTS, questions[:TIMED_QUESTIONS]).leaves

    def num_right(lm: LM) -> int:
        scored = intents.score_tree(lm, intents.build_tree(lm, intents.SHOTS, questions))
        return intents.num_right(scored.probabilities, questions)

    quiet: dict[str, Any] = {"device": "cpu", "show_progress_bar": False}
    ways: dict[str, Callable[[], LM]] = {
        FULL: lambda: load(folder, **quiet),
        "float32, packed": lambda: load(folder, pack_weights=True, **quiet),
        "bfloat16": lambda: load(folder, dtype="bfloat16", **quiet),
        "bfloat16, packed": lambda: load(folder, dtype="bfloat16", pack_weights=True, **quiet),
        "int8": lambda: load(folder, weights="int8", **quiet),
        "int8-dynamic": lambda: load(folder, weights="int8-dynamic", **quiet),
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        ways["nf4 (bitsandbytes)"] = lambda: _in_4_bits(folder)
    return "SmolLM2-135M", ways, Job(texts, num_right, len(questions))


def _in_4_bits(folder: Path) -> LM:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))  # the first call puts the weights into another order
    return LM(model, AutoTokenizer.from_pretrained(folder))


def _random_gpt2() -> tuple[str, dict[str, Callable[[], LM]], Job]:
    model, tokenizer = workloads.make_model(), workloads.make_tokenizer()
    writer = Writer(7)
    context = writer.text(170)
    ends = [f"\n\n{writer.text(12)}" for _ in range(40)]

    def quantized(way: int8.Way) -> LM:
        copied = copy.deepcopy(model)
        int8.quantize(copied, way)
        return LM(copied, tokenizer)

    halved = copy.deepcopy(model).to(torch.bfloat16)
    ways: dict[str, Callable[[], LM]] = {
        FULL: lambda: LM(model, tokenizer),
        "float32, packed": lambda: LM(model, tokenizer, pack_weights=True),
        "bfloat16": lambda: LM(halved, tokenizer),
        "bfloat16, packed": lambda: LM(halved, tokenizer, pack_weights=True),
        "int8": lambda: quantized("int8"),
        "int8-dynamic": lambda: quantized("int8-dynamic"),
    }
    return "GPT-2 124M, random", ways, Job(lambda lm: [Text(context, lm) + end for end in ends], None, None)


def _rows(name: str, lms: dict[str, LM], job: Job) -> list[Row]:
    texts = {way: job.texts(lm) for way, lm in lms.items()}
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in lms}
    for round_idx in range(ROUNDS + 1):
        for way, lm in lms.items():
            taken = _seconds(lm, texts[way])
            if round_idx:  # the first finds out about the model
                seconds[way].append(taken)
    rows = []
    for way, lm in lms.items():
        few = texts[way][:: -(-len(texts[way]) // COMPARED)]
        cost = verify(few, against=lms[FULL]).cost
        assert cost is not None
        ratios = [
            Spread.of_ratios([one[part] for one in seconds[way]], [one[part] for one in seconds[FULL]])
            for part in (0, 1)
        ]
        rows.append(
            Row(
                model=name,
                weights=way,
                linears=lm.stats.linears,
                scoring=ratios[0],
                generation=ratios[1],
                weight_bytes=lm.stats.weight_bytes,
                copied_bytes=lm.stats.packed_weight_bytes,
                gap=cost.gap,
                largest_gap=cost.largest_gap,
                mean_gap=cost.mean_gap,
                flips=cost.argmax_flips,
                tokens=cost.num_tokens,
                right=None if job.num_right is None else job.num_right(lm),
                questions=job.num_questions,
            )
        )
        lm.clear()
    return rows


def _seconds(lm: LM, texts: Sequence[Text]) -> tuple[float, float]:
    """The thread's time to score all texts, and to continue some of them by so many tokens."""
    lm.clear()
    started = time.process_time()
    lm.token_logprobs(texts)
    scored = time.process_time()
    generate(texts[:NUM_PROMPTS], max_new_tokens=NEW_TOKENS)
    generated = time.process_time()
    lm.clear()
    return scored - started, generated - scored


def _table(rows: Sequence[Row]) -> str:
    headings = [
        "model",
        "weights",
        "scoring",
        "generation",
        "MB",
        "MB of copies",
        "largest gap",
        "mean",
        "flips",
        "right",
    ]
    return markdown(
        headings,
        [
            [
                row.model,
                row.weights,
                with_range(row.scoring),
                with_range(row.generation),
                megabytes(row.weight_bytes),
                megabytes(row.copied_bytes),
                f"{row.gap:.2g}",
                f"{row.mean_gap:.2g}",
                f"{row.flips:,} of {row.tokens:,}",
                "" if row.right is None else f"{row.right} of {row.questions}",
            ]
            for row in rows
        ],
    )


def _instructions() -> str:
    """The instructions for few bits that the processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return " ".join(name for name in BIT_FEATURES if name in flags) or "none of " + " ".join(BIT_FEATURES)


SUITE = Bits()

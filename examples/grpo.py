"""Train the demo model with GRPO for a few steps, twice: with TRL's own log-probabilities, and with `ForestLogprobs`.

    instruction + shot 1 + ... + shot 8 + question 1      one prompt, a group of 8 completions behind it
    ├── completion 1
    ├── ...
    └── completion 8

The reward can be checked: half a point for a line of three keywords, half for keywords of the question's intent. Losses
and gradients of both runs are the same up to rounding. TRL forwards the prompt once for each completion, and the forest
once for the group. The model is SmolLM2-135M with LoRA on its attention.

    python -m pip install 'trl>=1.16' peft        # or: pip install '.[trl,demo]'
    python examples/grpo.py
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from intents import DATA, INSTRUCTION, INTENTS, SHOTS, read_questions
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from backprompt.integrations.trl import ForestLogprobs
from demo_model import add_model_argument, demo_model_folder

GROUP = 8
STEPS = 3
COMPLETION_TOKENS = 12
SEED = 7


class ForestTrainer(ForestLogprobs, GRPOTrainer):
    """GRPO with each distinct token forwarded and sent backward once."""


def make_dataset() -> Dataset:
    shots = "".join(f"Message: {shot.string}\nKeywords: {INTENTS[shot.intent]}\n\n" for shot in SHOTS)
    return Dataset.from_list(
        [
            {
                "prompt": f"{INSTRUCTION}{shots}Message: {question.string}\nKeywords:",
                "keywords": INTENTS[question.intent],
            }
            for question in read_questions(DATA / "questions.tsv")
        ]
    )


def score_keywords(completions: Sequence[str], keywords: Sequence[str], **others: Any) -> list[float]:
    """Half a point for a first line of three keywords, and half for the share of the intent's keywords among them."""
    rewards = []
    for completion, expected in zip(completions, keywords, strict=True):
        line, end, _ = completion.partition("\n")
        found = [keyword.strip() for keyword in line.split(",")]
        wanted = expected.split(", ")
        is_formed = bool(end) and len(found) == 3
        rewards.append(is_formed / 2 + sum(keyword in found for keyword in wanted) / len(wanted) / 2)
    return rewards


class Clocked:
    """Counts the seconds of a method of a trainer, and of its backward passes."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.seconds = 0.0
        name = "_get_per_token_logps_and_entropies"
        setattr(trainer, name, self._clocked(getattr(trainer, name)))
        trainer.accelerator.backward = self._clocked(trainer.accelerator.backward)

    def _clocked(self, work: Any) -> Any:
        def clocked(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return clocked


def train(kind: type[GRPOTrainer], name: str, folder: str, steps: int) -> tuple[GRPOTrainer, float]:
    """Train from the same beginning; return the trainer, and the seconds of forward and backward passes."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = kind(
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32),
        reward_funcs=score_keywords,
        args=GRPOConfig(
            folder,
            per_device_train_batch_size=GROUP,
            num_generations=GROUP,
            max_completion_length=COMPLETION_TOKENS,
            max_steps=steps,
            learning_rate=1e-4,
            beta=0.02,
            logging_steps=1,
            seed=SEED,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            log_level="error",
        ),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    clock = Clocked(trainer)
    trainer.train()
    return trainer, clock.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_model_argument(parser)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of each run (default: %(default)s)")
    options = parser.parse_args(arguments)
    name = str(demo_model_folder()) if options.model is None else options.model
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        plain, plain_seconds = train(GRPOTrainer, name, folder, options.steps)
        forest, forest_seconds = train(ForestTrainer, name, folder, options.steps)
    headings = ("loss, TRL", "loss, forest", "gradient, TRL", "gradient, forest")
    print(f"\n{'step':>4} {'reward':>8}" + "".join(f"{heading:>18}" for heading in headings))
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (plain, forest)]
    for step, (own, ours) in enumerate(zip(*logs, strict=True), 1):
        print(
            f"{step:4} {own['reward']:8.3f}"
            + "".join(f"{log[name]:18.6f}" for name in ("loss", "grad_norm") for log in (own, ours))
        )
    given = sum(entry["forest/tokens_given"] for entry in logs[1])
    forwarded = sum(entry["forest/tokens_forwarded"] for entry in logs[1])
    print(
        f"\nTokens of a call, on average: {given / options.steps:,.0f} in the batch, {forwarded / options.steps:,.0f} "
        f"forwarded.\nForward and backward passes: {plain_seconds:.1f} s with TRL's own method, {forest_seconds:.1f} s "
        f"with the forest, {plain_seconds / forest_seconds:.1f} times as fast."
    )


if __name__ == "__main__":
    main()

"""A product manual, and three adapters that answer behind it: each judges requests by another question.

    manual + request.with_adapter("answered")       does the manual answer it?
    manual + request.with_adapter("urgent")         must it be answered today?
    manual + request.with_adapter("cleaning")       is it about cleaning?

The base model reads the manual, so all three adapters share it: an adapter is on only for the tokens of its requests.
Each adapter is first trained in this way, in a few steps: behind the keys and values of the manual, on requests with
known answers. On other requests, the example then counts right answers and computed tokens, and compares three whole
runs in which each adapter reads the manual, too.

    python -m pip install peft
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from backprompt import LM, Text, evaluate
from backprompt.classify import predict_proba
from demo_model import add_model_argument, load_model

MANUAL = (Path(__file__).parent / "data" / "manual.txt").read_text(encoding="utf-8").strip()
QUESTIONS = {
    "answered": "Does the manual answer this?",
    "urgent": "Must this be answered today?",
    "cleaning": "Is this about cleaning?",
}
ANSWERS = (" yes", " no")


@dataclass(frozen=True)
class Request:
    """A request, and whether the answer to each of the questions is yes."""

    string: str
    answered: bool
    urgent: bool
    cleaning: bool


KNOWN = (
    Request("there is water under the machine", True, True, False),
    Request("How often do I have to descale?", True, False, True),
    Request("Do you sell green cups?", False, False, False),
    Request("can the tray go in the dishwasher", True, False, True),
    Request("It smokes and I cannot switch it off!", False, True, False),
    Request("How many litres does the tank hold?", True, False, False),
    Request("Which cloth do you recommend for the wooden shelf?", False, False, True),
    Request("My guests arrive at noon and no coffee comes out.", True, True, False),
    Request("Is the grinder of my neighbour any good?", False, False, False),
    Request("Milk has dried in the wand, how do I get it off?", False, False, True),
    Request("The red light blinks again, and we open in an hour.", True, True, False),
    Request("How do I reset the volumes?", True, False, False),
)
NEW = (
    Request("How long is the guarantee on the boiler?", True, False, False),
    Request("Help, water is running into the socket!", False, True, False),
    Request("How do I wash the baskets?", True, False, True),
    Request("Where can I buy your shares?", False, False, False),
    Request("The pump got really loud, and I need coffee for thirty people now.", True, True, False),
    Request("What do I do with the cleaning tablet?", True, False, True),
    Request("Do you have a job for my son?", False, False, False),
    Request("How hot should the milk be?", True, False, False),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="of training each adapter (default: 5)")
    arguments = parser.parse_args(argv)
    lm = with_adapters(load_model(arguments.model))
    manual = Text(MANUAL, lm)
    print(f"A manual of {len(manual.tokens)} tokens, {len(NEW)} requests, and {len(QUESTIONS)} questions on each.\n")

    untrained = ask(manual, adapters=dict.fromkeys(QUESTIONS))
    begin = time.perf_counter()
    train(lm, arguments.steps)
    print(f"Adapters trained on {len(KNOWN)} other requests in {time.perf_counter() - begin:.0f} s.\n")
    lm.clear()
    found, computed, seconds = counted(lm, lambda: ask(manual, adapters={name: name for name in QUESTIONS}))

    print(f"{'probability of yes':<68}" + "".join(f"{name:>10}" for name in QUESTIONS))
    for idx, request in enumerate(NEW):
        cells = [f"{found[name][idx]:.2f} {'yes' if getattr(request, name) else ' no'}" for name in QUESTIONS]
        print(f"{request.string:<68}" + "".join(f"{cell:>10}" for cell in cells))
    for title, probabilities in (("right without an adapter", untrained), ("right with the adapters", found)):
        print(f"{title:<68}" + "".join(f"{num_right(probabilities, name):>8}/{len(NEW)}" for name in QUESTIONS))

    whole, whole_seconds = whole_runs(lm)
    print(f"\n{'':<36}{'tokens computed':>16}{'seconds':>9}")
    print(f"{'adapters behind one shared manual':<36}{computed:>16,}{seconds:>9.1f}")
    print(f"{'three whole runs, one an adapter':<36}{whole:>16,}{whole_seconds:>9.1f}")
    print(f"\nLargest gap in logits to peft behind the plain model's cache: {largest_gap(lm):.0e}.")


def with_adapters(lm: LM) -> LM:
    """The model with an untrained adapter for each question, all of them inactive."""
    torch.manual_seed(0)
    first, *others = QUESTIONS
    num_layers = lm.model.config.num_hidden_layers
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=list(range(num_layers // 2, num_layers)),  # so that the backward ends there
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(lm.model, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    model.base_model.disable_adapter_layers()
    return LM(model.eval(), lm.tokenizer, joins="error")


def asked(request: Request, name: str) -> str:
    return f"\n\nRequest: {request.string}\n{QUESTIONS[name]} Answer yes or no:"


def ask(manual: Text, adapters: dict[str, str | None]) -> dict[str, list[float]]:
    """The probability of yes for each new request and question, with the given adapter for each question."""
    prompts = [
        manual + Text(asked(request, name)).with_adapter(adapters[name]) for name in QUESTIONS for request in NEW
    ]
    yes = predict_proba(prompts, ANSWERS, end_of_prompt="")[:, 0].tolist()
    return {name: yes[idx * len(NEW) : (idx + 1) * len(NEW)] for idx, name in enumerate(QUESTIONS)}


def num_right(probabilities: dict[str, list[float]], name: str) -> int:
    return sum((p > 0.5) == getattr(request, name) for p, request in zip(probabilities[name], NEW, strict=True))


def counted(lm: LM, work: Any) -> tuple[Any, int, float]:
    """The result of some work, the tokens that it computed, and its seconds."""
    before, begin = lm.stats, time.perf_counter()
    found = work()
    return found, (lm.stats - before).tokens_computed, time.perf_counter() - begin


def train(lm: LM, num_steps: int) -> None:
    """Let each adapter learn the answers to its question, behind the base model's keys and values of the manual."""
    cache = Text(MANUAL, lm)().past_key_values()
    cache.batch_repeat_interleave(len(KNOWN))
    model: Any = lm.model
    model.base_model.enable_adapter_layers()
    for name in QUESTIONS:
        model.set_adapter(name)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=4e-3)
        for _ in range(num_steps):
            answers_loss(lm, copy.deepcopy(cache), name).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.base_model.disable_adapter_layers()


def answers_loss(lm: LM, cache: Any, name: str) -> torch.Tensor:
    """The mean loss of the known answers in the plain model, whose active adapter is off for the cached text."""
    prompts = [lm.tokenizer(asked(request, name))["input_ids"] for request in KNOWN]
    yes, no = (lm.tokenizer(answer)["input_ids"] for answer in ANSWERS)
    answers = [yes if getattr(request, name) else no for request in KNOWN]
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(
        [torch.tensor([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)], True, -100
    )
    logits = lm.model(input_ids=ids, past_key_values=cache).logits  # padding stands behind all tokens that count
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def whole_runs(lm: LM) -> tuple[int, float]:
    """The tokens and seconds of reading the manual and all requests once under each adapter."""
    model: Any = lm.model
    num_computed, seconds = 0, 0.0
    model.base_model.enable_adapter_layers()
    for name in QUESTIONS:
        model.set_adapter(name)
        prompts = [Text(MANUAL, lm) + asked(request, name) for request in NEW]
        evaluate(Text("warm-up", lm))
        _, computed, own_seconds = counted(
            lm, lambda prompts=prompts: predict_proba(prompts, ANSWERS, end_of_prompt="")
        )
        num_computed, seconds = num_computed + computed, seconds + own_seconds
    model.base_model.disable_adapter_layers()
    return num_computed, seconds


@torch.no_grad()
def largest_gap(lm: LM) -> float:
    """The distance of next-token logits from those of the plain model with the adapter on behind the manual."""
    manual = Text(MANUAL, lm)
    found = {name: (manual + Text(asked(NEW[0], name)).with_adapter(name)).logits for name in QUESTIONS}
    cache = manual().past_key_values()
    model: Any = lm.model
    model.base_model.enable_adapter_layers()
    gaps = []
    for name, logits in found.items():
        model.set_adapter(name)
        ids = lm.tokenizer(asked(NEW[0], name))["input_ids"]
        plain = model(input_ids=torch.tensor([ids]), past_key_values=copy.deepcopy(cache)).logits[0, -1]
        gaps.append(float((logits - plain).abs().max()))
    model.base_model.disable_adapter_layers()
    return max(gaps)


if __name__ == "__main__":
    main()

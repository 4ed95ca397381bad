"""The inputs of CAPPr and backprompt: workloads whose parts a space joins, and the settings of CAPPr to try."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import workloads
from benchmarks.workloads import Prompt, Workload

ROUNDS = 3
NUM_CLASSES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Setting:
    """How CAPPr is called."""

    cached: bool  # with its cache of what prompts share
    batch_size: int  # prompts
    batch_size_completions: int | None  # None: all of them


@dataclass(frozen=True)
class Case:
    """A workload, and the settings of CAPPr that are tried on its first prompts."""

    table: str
    workload: Workload
    settings: tuple[Setting, ...]
    num_tried: int
    max_rounds: int = ROUNDS


def settings(cached: Sequence[tuple[int, int | None]], whole: Sequence[tuple[int, int | None]]) -> tuple[Setting, ...]:
    """Batch sizes (prompts, completions) to try with CAPPr's cache of what prompts share, and without it."""
    return (*(Setting(True, *sizes) for sizes in cached), *(Setting(False, *sizes) for sizes in whole))


def cases() -> list[Case]:
    many_classes = settings([(1, None), (1, 16), (2, 16), (4, 16), (1, 32)], [(1, 16), (2, 16)])
    few = settings([(1, None), (4, None), (8, None)], [(8, None)])
    five = [
        Case("five", workloads.two_choices(), settings([], [(b, None) for b in (1, 4, 8, 16, 48)]), num_tried=48),
        Case("five", workloads.classes(2), many_classes, num_tried=2),
        Case("five", workloads.classes(16), many_classes, num_tried=4),
        Case("five", workloads.few_shots(), few, num_tried=8),
        Case("five", workloads.nested(), settings([(1, None), (3, None), (6, None)], [(8, None)]), num_tried=18),
    ]
    curve = [
        Case("curve", workloads.classes(96, num, shared_words=40), curve_settings(num), num_tried=8, max_rounds=1)
        for num in NUM_CLASSES
    ]
    names_settings = settings([(4, None), (8, None), (16, None)], [(8, None)])  # no batches of completions
    names = [
        Case("names", workloads.one_word_classes(96, num, shared_words=40), names_settings, num_tried=16, max_rounds=1)
        for num in NUM_CLASSES
    ]
    return [joined_by_spaces(case) for case in five + curve + names]


def curve_settings(num_classes: int) -> tuple[Setting, ...]:
    """About as many rows in a batch for any number of classes."""
    cached: list[tuple[int, int | None]] = [(max(1, rows // num_classes), None) for rows in (16, 32, 64)]
    if num_classes > 16:
        cached += [(1, 16), (4, 16)]
    return settings(list(dict.fromkeys(cached)), [(max(1, 16 // num_classes), None)])


def joined_by_spaces(case: Case) -> Case:
    """The same with parts that a space joins, as CAPPr does; so the ids of parts apart are those of the whole."""
    prompts = [
        Prompt(
            tuple(part.strip() for part in prompt.parts), tuple(completion.strip() for completion in prompt.completions)
        )
        for prompt in case.workload.prompts
    ]
    return dataclasses.replace(case, workload=Workload(case.workload.name, tuple(prompts)))


def with_spaces(workload: Workload) -> Workload:
    """The same with the spaces in the strings, for who does not add them: as parts and completions are encoded."""
    prompts = [
        Prompt((p.parts[0], *(f" {part}" for part in p.parts[1:])), tuple(f" {c}" for c in p.completions))
        for p in workload.prompts
    ]
    return Workload(workload.name, tuple(prompts))

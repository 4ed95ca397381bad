"""The measurements in the order of their importance, within a budget of seconds.

Each step measures some figures of one line, and says them as a line of JSON at once: a run that is cut off has told
what it had measured. A step that would not fit what is left of the budget is left out, and said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.rows import as_json
from benchmarks.suite import Say
from benchmarks.suites.gpu import contenders, counting
from benchmarks.suites.gpu.lines import BACKPROMPT, GENERATE, GENERATE_BATCH, PADDED, RECIPE, Line
from benchmarks.suites.gpu.rigs import (
    GPT2,
    GPT2_FLOAT32,
    LLAMA_1B,
    LLAMA_8B,
    TINY_GPT2,
    TINY_LLAMA,
    Rig,
    Shape,
    best_of,
)
from benchmarks.suites.gpu.works import LABELS, NESTED, WORKS, Work, num_distinct, num_tokens
from benchmarks.workloads import token_ids

SECONDS = "seconds"
"""The figure that steps add to, and do not replace."""
SHARED_TOKENS, OWN_TOKENS = 512, 20
"""Of prompts that are continued: the first of all, and those of each one."""


@dataclass(frozen=True)
class Sizes:
    """Which models are measured, on what, and how large the works are."""

    device: torch.device
    scale: float
    shapes: tuple[Shape, ...]
    more_shapes: tuple[tuple[Shape, tuple[Work, ...]], ...]
    num_texts: int
    num_new: int


def on_cuda() -> Sizes:
    more = ((LLAMA_8B, (LABELS,)), (GPT2_FLOAT32, WORKS[:4]))
    return Sizes(torch.device("cuda"), 1.0, (LLAMA_1B, GPT2), more, num_texts=64, num_new=64)


def try_out() -> Sizes:
    """All steps with tiny models on the CPU, in seconds."""
    more = ((TINY_GPT2, (NESTED,)),)
    return Sizes(torch.device("cpu"), 0.03, (TINY_LLAMA, TINY_GPT2), more, num_texts=2, num_new=2)


@dataclass(frozen=True)
class Step:
    """Some figures of a line; `seconds`: what must be left of the budget for it to begin."""

    model: str
    work: str
    seconds: float
    figures: Callable[[], dict[str, Any]]


class Measuring:
    """Runs the steps.

    Attributes:
        lines: what was measured so far, a line for each model and work.

    """

    def __init__(self, sizes: Sizes, seconds: float, say: Say) -> None:
        self._sizes, self._say = sizes, say
        self._stop = time.perf_counter() + seconds
        self._rigs: dict[str, Rig] = {}
        self.lines: dict[tuple[str, str], Line] = {}

    def run(self) -> Iterator[Line]:
        """Yield the line that a step has added to, after each step."""
        for step in self._steps():
            left = self._stop - time.perf_counter()
            if left < step.seconds:
                self._say(json.dumps({"model": step.model, "work": step.work, "left out": f"{left:.0f} s are left"}))
                continue
            try:
                figures = step.figures()
            except Exception as error:  # a rival without memory, say: all other steps go on
                self._say(json.dumps({"model": step.model, "work": step.work, "error": repr(error)[:500]}))
                self._free()
                continue
            line = self.lines.setdefault((step.model, step.work), Line(step.model, step.work))
            line.seconds |= figures.pop(SECONDS, {})
            for name, value in figures.items():
                setattr(line, name, value)
            self._say(json.dumps({"left": round(self._stop - time.perf_counter()), **as_json(line)}))
            yield line

    def any_rig(self) -> Rig:
        """A rig that was made; the first one if there is none."""
        return next(iter(self._rigs.values())) if self._rigs else self._rig(self._sizes.shapes[0])

    def _steps(self) -> Iterator[Step]:
        """Yield all steps; the most important first."""
        sizes = self._sizes
        for shape in sizes.shapes:
            for work in WORKS:
                yield Step(shape.name, work.name, 6, partial(self._scored, shape, work))
        for shape in sizes.shapes:
            for work in WORKS:
                yield Step(shape.name, work.name, 4, partial(self._counted, shape, work))
        for shape in sizes.shapes:
            for name, num_texts, num_before in self._continued():
                yield Step(shape.name, name, 8, partial(self._generated, shape, num_texts, num_before))
        for shape in sizes.shapes:
            for work in WORKS:
                yield Step(shape.name, work.name, 4, partial(self._rivals, shape, work))
        for shape in sizes.shapes:
            for name, num_texts, num_before in self._continued():
                yield Step(shape.name, name, 8, partial(self._generated_by_rivals, shape, num_texts, num_before))
        for shape, works in sizes.more_shapes:
            for work in works:
                yield Step(shape.name, work.name, 12, partial(self._scored, shape, work))
                yield Step(shape.name, work.name, 12, partial(self._rivals, shape, work))
            if shape not in sizes.shapes:
                self._rigs.pop(shape.name, None)
                self._free()
        for shape in sizes.shapes if sizes.device.type == "cuda" else ():  # its pages take most of the memory
            name, num_texts, num_before = self._continued()[0]
            yield Step(shape.name, name, 20, partial(self._generated_in_pages, shape, num_texts, num_before))

    def _continued(self) -> list[tuple[str, int, int]]:
        """Return the name of each generation, the number of its texts, and how many tokens they share."""
        num_texts, num_new, shared = self._sizes.num_texts, self._sizes.num_new, SHARED_TOKENS
        if self._sizes.scale < 1:
            shared = round(shared * self._sizes.scale)
        several = f"{num_texts} texts x {num_new} new tokens behind {shared}"
        return [(several, num_texts, shared), (f"1 text x {num_new} new tokens", 1, 100)]

    def _scored(self, shape: Shape, work: Work) -> dict[str, Any]:
        rig = self._rig(shape)
        drawn = rig.drawn(work, "size")
        limit = contenders.linear_seconds(rig, num_distinct(drawn))
        self._run(rig, work, "warm")
        seconds = best_of(lambda idx: self._run(rig, work, idx))
        before = rig.lm.stats
        peak = self._measured(rig, work, "peak", counting.peak_bytes_of)
        spent, held = rig.lm.stats - before, rig.lm.stats.bytes_held
        num_in_a_pass = -(-spent.tokens_computed // spent.forward_passes)
        rig.lm.clear()
        plain = counting.peak_bytes_of(rig, lambda: contenders.plain_pass(rig, num_in_a_pass))
        phases = self._measured(rig, work, "phases", counting.phases_of)
        return {
            SECONDS: {BACKPROMPT: seconds},
            "tokens": num_tokens(drawn),
            "distinct": num_distinct(drawn),
            "computed": spent.tokens_computed,
            "passes": spent.forward_passes,
            "kernel": rig.lm.stats.kernel,
            "limit": limit,
            "phases": phases,
            "held": held,
            "peak": peak,
            "pass_bytes": plain,
        }

    def _rivals(self, shape: Shape, work: Work) -> dict[str, Any]:
        rig = self._rig(shape)
        rig.lm.clear()
        drawn = rig.drawn(work, "rivals")
        padded = contenders.Padded(rig, drawn)
        found = padded.run()  # warms up, too
        own = [float(scores.double().sum()) for scores in contenders.backprompt_scores(rig, drawn)]
        rig.lm.clear()
        gap = max(abs(own[idx] - value) for idx, value in found.items())
        seconds = {PADDED: best_of(lambda _: rig.seconds_of(padded.run), at_most=1.5) / padded.share}
        contenders.recipe(rig, drawn[:2])
        seconds[RECIPE] = best_of(lambda _: rig.seconds_of(lambda: contenders.recipe(rig, drawn)), at_most=1.5)
        return {SECONDS: seconds, "gap": gap}

    def _counted(self, shape: Shape, work: Work) -> dict[str, Any]:
        rig = self._rig(shape)
        before = rig.lm.stats.forward_passes
        waits = self._measured(rig, work, "waits", counting.synchronisations_of, part=0.25)
        num_passes = rig.lm.stats.forward_passes - before
        launches = self._measured(rig, work, "launches", counting.launches_of, part=0.25)
        return {
            "launches": None if launches is None else launches / num_passes,
            "synchronisations": None if waits is None else sum(waits.values()) / num_passes,
            "waits": {} if waits is None else dict(waits.most_common(10)),
        }

    def _generated(self, shape: Shape, num_texts: int, num_shared: int) -> dict[str, Any]:
        rig = self._rig(shape)
        num_new = self._sizes.num_new

        def run(mark: object) -> float:
            """The seconds of one call for new prompts; the graphs of earlier calls are there."""
            prompts = self._prompts(rig, num_texts, num_shared, mark)
            return rig.seconds_of(lambda: contenders.backprompt_continues(rig, prompts, num_shared, num_new))

        rig.lm.clear()
        before = rig.lm.stats
        first = run("warm")
        spent, held = rig.lm.stats - before, rig.lm.stats.bytes_held
        return {
            SECONDS: {BACKPROMPT: best_of(run)},
            "first": first,
            "computed": spent.tokens_computed,
            "passes": spent.forward_passes,
            "kernel": rig.lm.stats.kernel,
            "held": held,
        }

    def _generated_by_rivals(self, shape: Shape, num_texts: int, num_shared: int) -> dict[str, Any]:
        rig = self._rig(shape)
        rig.lm.clear()
        prompts = self._prompts(rig, num_texts, num_shared, "rival")
        contenders.transformers_continues(rig, prompts, 4)
        seconds = best_of(
            lambda _: rig.seconds_of(lambda: contenders.transformers_continues(rig, prompts, self._sizes.num_new)),
            at_most=3,
        )
        return {SECONDS: {GENERATE: seconds}}

    def _generated_in_pages(self, shape: Shape, num_texts: int, num_shared: int) -> dict[str, Any]:
        rig = self._rig(shape)
        rig.lm.clear()
        prompts = self._prompts(rig, num_texts, num_shared, "pages")
        seconds = best_of(
            lambda _: rig.seconds_of(
                lambda: contenders.transformers_continues_batch(rig, prompts, self._sizes.num_new)
            ),
            rounds=2,
        )
        return {SECONDS: {GENERATE_BATCH: seconds}}

    def _run(self, rig: Rig, work: Work, mark: object) -> float:
        """The seconds of one whole call that begins with nothing computed."""
        rig.lm.clear()
        drawn = rig.drawn(work, str(mark))
        return rig.seconds_of(lambda: contenders.backprompt_scores(rig, drawn))

    def _measured(self, rig: Rig, work: Work, mark: str, measure: Callable[..., Any], part: float = 1.0) -> Any:
        """What `measure` finds of one whole call that begins with nothing computed."""
        rig.lm.clear()
        drawn = rig.drawn(work, mark, part)
        return measure(rig, lambda: contenders.backprompt_scores(rig, drawn))

    def _prompts(self, rig: Rig, num_texts: int, num_shared: int, mark: object) -> list[list[int]]:
        shared = token_ids(num_shared, (mark, "shared"), rig.shape.vocabulary)
        return [shared + token_ids(OWN_TOKENS, (mark, idx), rig.shape.vocabulary) for idx in range(num_texts)]

    def _rig(self, shape: Shape) -> Rig:
        """The rig of a model, which is made at its first use."""
        if shape.name not in self._rigs:
            self._rigs[shape.name] = Rig(shape, self._sizes.device, self._sizes.scale)
        return self._rigs[shape.name]

    def _free(self) -> None:
        for rig in self._rigs.values():
            rig.lm.clear()
        if self._sizes.device.type == "cuda":
            torch.cuda.empty_cache()

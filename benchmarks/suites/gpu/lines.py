"""What is measured of a work, a row each, and the table that shows the rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.tables import markdown, megabytes

BACKPROMPT = "backprompt"
PADDED = "plain padded"
RECIPE = "cache recipe"
GENERATE = "model.generate"
GENERATE_BATCH = "model.generate_batch"


@dataclass
class Line:
    """A work on a model; what was not measured is empty or None.

    Attributes:
        model, work: their names.
        tokens: of all texts; `distinct`: those that a forest holds; `computed`: those that were forwarded.
        passes: forward passes of one call.
        kernel: the attention kernel that served.
        seconds: the lowest of three whole calls, planning and scoring included, by contender.
        limit: seconds of the linear layers of the body alone, on as many rows as there are distinct tokens.
        phases: seconds of the body with its attention, of the head, and of the rest, each synchronised.
        launches, synchronisations: of one call of a quarter of the work, over its passes.
        waits: where the host waited for the device, and how often; the ten places with the most.
        held: bytes of keys, values and states held after a call.
        peak: the most bytes that a call took beside the model.
        pass_bytes: the most bytes that a plain forward pass takes on as many tokens as a pass of the call has.
        first: seconds of the first call of a generation, in which its steps are captured.
        gap: the largest difference from the padded batches in the log-probability of a completion, nats.

    """

    model: str
    work: str
    tokens: int = 0
    distinct: int = 0
    computed: int = 0
    passes: int = 0
    kernel: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    limit: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    launches: float | None = None
    synchronisations: float | None = None
    waits: dict[str, int] = field(default_factory=dict)
    held: int | None = None
    peak: int | None = None
    pass_bytes: int | None = None
    first: float | None = None
    gap: float | None = None

    @property
    def of_limit(self) -> float | None:
        """The limit's seconds over backprompt's."""
        own = self.seconds.get(BACKPROMPT)
        return None if own is None or self.limit is None else self.limit / own

    @property
    def of_rival(self) -> float | None:
        """The seconds of the fastest rival over backprompt's."""
        own, rivals = self.seconds.get(BACKPROMPT), [s for name, s in self.seconds.items() if name != BACKPROMPT]
        return None if own is None or not rivals else min(rivals) / own

    @property
    def of_needed(self) -> float | None:
        """The peak over the bytes that are held and those of a plain pass."""
        known = (self.peak, self.held, self.pass_bytes)
        return None if None in known else self.peak / (self.held + self.pass_bytes)


CONTENDERS = (BACKPROMPT, PADDED, RECIPE, GENERATE, GENERATE_BATCH)


def table_of(lines: list[Line]) -> str:
    return markdown(
        [
            "model, work",
            "tokens",
            "distinct",
            *CONTENDERS,
            "best rival / backprompt",
            "linear layers alone",
            "of limit",
            "forward, head, rest",
            "launches a pass",
            "synchronisations a pass",
            "held MB",
            "peak MB",
            "of held and a plain pass",
        ],
        [
            [
                f"{line.model}, {line.work}",
                f"{line.tokens:,}" if line.tokens else "",
                f"{line.distinct:,}" if line.distinct else "",
                *(_number(line.seconds.get(name), 4) for name in CONTENDERS),
                _number(line.of_rival, 2),
                _number(line.limit, 4),
                _number(line.of_limit, 3),
                ", ".join(_number(seconds, 3) for seconds in line.phases.values()),
                _number(line.launches, 0),
                _number(line.synchronisations, 1),
                megabytes(line.held),
                megabytes(line.peak),
                _number(line.of_needed, 2),
            ]
            for line in lines
        ],
    )


def _number(value: float | None, num_digits: int) -> str:
    return "" if value is None else f"{value:.{num_digits}f}"

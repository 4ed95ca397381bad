"""The blocks of Python in the pages of this folder: found, run, recorded and compared.

```python              runs; the blocks of a page share their names
```output              what the block before it prints with the demo model
<!-- check             hidden; runs, and asserts what the page says of blocks
...
-->
<!-- not run: why -->  on the line before a block leaves the block out
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the demo model, as pages load it

BLOCK = re.compile(
    r"^(?P<left_out><!-- not run: [^>]+ -->\n)?```python\n(?P<code>.*?)^```$"
    r"(?:\n\n?^```output\n(?P<output>.*?)^```$)?"
    r"|^<!-- check\n(?P<check>.*?)^-->$",
    re.DOTALL | re.M,
)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d*)?(?:e[+-]?\d+)?")
ROUNDING = (
    1e-3  # below it a gap is rounding, which another processor does in another way
)
RELATIVE = 0.02


@dataclass(frozen=True)
class Block:
    """Code of a page, and what stands behind it."""

    code: str
    output: str | None = None
    is_run: bool = True
    is_check: bool = False


def blocks_of(page: str) -> list[Block]:
    """The blocks of the page at this path below docs/, in their order.

    Raises:
        ValueError: a block or an output is not understood.

    """
    text = (DOCS / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    blocks = [
        Block(match["check"], is_check=True)
        if match["check"] is not None
        else Block(match["code"], match["output"], not match["left_out"])
        for match in found
    ]
    for mark, num_found in (
        ("```python\n", sum(not block.is_check for block in blocks)),
        ("```output\n", sum(block.output is not None for block in blocks)),
        ("<!-- check\n", sum(block.is_check for block in blocks)),
    ):
        if text.count(mark) != num_found:
            raise ValueError(
                f"{page}: {mark!r} stands there {text.count(mark)} times, "
                f"of which {num_found} were understood."
            )
    return blocks


def run(page: str) -> list[str]:
    """What each block of the page prints; "" for those that are not run.

    Raises:
        AssertionError: a hidden check does not hold.

    """
    names: dict[str, Any] = {"__name__": "__main__"}
    return [
        _printed(lambda block=block: _run_block(block, page, names))
        for block in blocks_of(page)
    ]


def with_outputs(page: str, printed: list[str]) -> str:
    """The page's text, with these outputs behind its blocks; "" stands for none."""
    outputs = iter(printed)

    def replace(match: re.Match[str]) -> str:
        output = next(outputs)
        if match["check"] is not None or match["left_out"]:
            return match[0]
        return f"```python\n{match['code']}```" + (
            f"\n```output\n{output}```" if output else ""
        )

    return BLOCK.sub(replace, (DOCS / page).read_text(encoding="utf-8"))


def differ(printed: str, recorded: str) -> bool:
    """Whether the two differ in a word or a whole number, or another number by over 2%.

    Numbers with a point or an exponent that are 0.001 apart do not differ.
    """
    words, others = (
        NUMBER.split(" ".join(printed.split())),
        NUMBER.split(" ".join(recorded.split())),
    )
    numbers, recorded_numbers = NUMBER.findall(printed), NUMBER.findall(recorded)
    return words != others or any(map(_numbers_differ, numbers, recorded_numbers))


def _numbers_differ(printed: str, recorded: str) -> bool:
    if not re.search(r"[.e]", printed.rstrip(".")) and not re.search(
        r"[.e]", recorded.rstrip(".")
    ):
        return printed.rstrip(".,") != recorded.rstrip(".,")
    one, other = (
        float(number.rstrip(".,").replace(",", "")) for number in (printed, recorded)
    )
    unit = 10.0 ** -len(recorded.partition(".")[2].partition("e")[0])
    return abs(one - other) > max(
        ROUNDING, RELATIVE * abs(other), 2 * unit * ("e" not in recorded)
    )


def _run_block(block: Block, page: str, names: dict[str, Any]) -> None:
    code = compile(block.code, page, "exec")
    if block.is_run:
        exec(code, names)


def _printed(run: Callable[[], None]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        run()
    return "".join(line.rstrip() + "\n" for line in stdout.getvalue().splitlines())

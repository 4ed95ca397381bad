"""The page of the documentation that lists all families: docs/models.md."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from families.checks import Verdict
from families.configs import CHOSEN_KEYS

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEADING = "## Families of transformers"


def write(causal: Sequence[Verdict], media: Sequence[Verdict]) -> None:
    """Replace the tables of the page; the words before them stay."""
    words = PAGE.read_text().split(_HEADING)[0]
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}"
    parts = [
        f"{words}{_HEADING}",
        f"Written by `make families` with {versions}. Each family is a tiny random model in float32 on the CPU.",
        _tables("Classes that `AutoModelForCausalLM` gives", causal),
        _tables("Classes of images, sounds and texts, fed with texts", media),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n")


def _tables(title: str, verdicts: Sequence[Verdict]) -> str:
    right = [verdict for verdict in verdicts if verdict.status == "RIGHT"]
    rest = [verdict for verdict in verdicts if verdict.status != "RIGHT"]
    rows = [(one.model_type, f"`{one.class_name}`", one.way, _remarks(one)) for one in right]
    reasons = [(one.model_type, f"`{one.class_name}`", _reason(one)) for one in rest]
    counts = f"{len(right)} of {len(verdicts)} give the numbers of their plain call."
    return "\n\n".join(
        [
            f"### {title}",
            counts,
            _table(("family", "class", "way", "remarks"), rows),
            _table(("family", "class", "not evaluated, because"), reasons),
        ]
    )


def _remarks(verdict: Verdict) -> str:
    longest = ["up to `index_topk` tokens"] if verdict.longest == CHOSEN_KEYS else []
    return "; ".join([*longest, *(one.split(": ")[0] for one in verdict.remarks if " refused: " in one)])


def _reason(verdict: Verdict) -> str:
    if verdict.status == "UNBUILT":
        return f"no tiny model was built: {verdict.why}"
    return verdict.why.removeprefix(f"{verdict.class_name} ")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

"""One family against its plain call: evaluation, generation, caches, groups, special ids, packed weights, lengths."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backprompt import LM, BackpromptError, Text, UnsupportedModelError, evaluate
from families.configs import POSITIONS, VOCAB
from families.models import build, special_ids, word_tokenizer
from reference import plain_logits, token_logprobs_of

Status: TypeAlias = Literal["RIGHT", "WRONG", "REFUSED", "RAW", "UNBUILT"]

TOLERANCE = 2e-4
"""Largest gap of logits and log-probabilities, relative to the largest above 1; measured: 8e-5."""

_LENGTHS = (1, 2, 3, 5, 9, 14, 22, 31, 40)
_LONGEST = 120
_GENERATED = 6


@dataclass
class Verdict:
    """The verdict on a family.

    Attributes:
        model_type, class_name: name the family.
        status: RIGHT, WRONG for other numbers than the plain call's, REFUSED for an error that names the reason, RAW
            for an error that is not ours, UNBUILT where transformers makes no tiny model.
        why: the reason, if it is not right.
        way: how it was evaluated.
        longest: texts may have as many tokens; None if the model does not say.
        remarks: what is refused beside evaluation, and what could not be compared.
        gap: the largest of all.

    """

    model_type: str
    class_name: str
    status: Status
    why: str = ""
    way: str = ""
    longest: int | None = None
    remarks: list[str] = field(default_factory=list)
    gap: float = 0.0

    def line(self) -> str:
        said = [self.why, *self.remarks] if self.why else self.remarks
        gap = f"{self.gap:.0e}" if self.status in ("RIGHT", "WRONG") else "-"
        return f"{self.status:8}{self.model_type:26}{self.class_name:48}{self.way:10} gap {gap:6} {'; '.join(said)}"


def check(model_type: str, class_name: str, *, is_quick: bool = False) -> Verdict:
    """Compare a family with its plain call.

    Two experts may be equally good but for rounding. So other weights are tried where numbers differ.
    """
    first = _check(model_type, class_name, 0, is_quick)
    return first if first.status != "WRONG" else _check(model_type, class_name, 1, is_quick)


def _check(model_type: str, class_name: str, seed: int, is_quick: bool) -> Verdict:
    verdict = Verdict(model_type, class_name, "RIGHT")
    try:
        model = build(model_type, class_name, seed)
    except Exception as error:
        verdict.status, verdict.why = "UNBUILT", _one_line(error)
        return verdict
    family = _Family(model, verdict)
    try:
        family.evaluates(num_texts=5 if is_quick else 12)
    except UnsupportedModelError as error:
        verdict.status, verdict.why = "REFUSED", " ".join(str(error).split())
    except Wrong as error:
        verdict.status, verdict.why = "WRONG", str(error)
    except Exception as error:
        verdict.status, verdict.why = "RAW", _one_line(error)
    if verdict.status == "RIGHT":
        family.does("generation", family.generates)
        family.does("past_key_values", family.continues_from_caches)
        family.does("groups", family.evaluates_groups)
        family.does("special ids", family.evaluates_special_ids)
        family.does("unchanged configuration", family.left_the_configuration_alone)
        if not is_quick:
            family.does("packed weights", family.evaluates_with_packed_weights)
            family.does("lengths", family.ends_where_it_must)
    return verdict


class Wrong(Exception):
    """Numbers are not those of the plain call."""


class NotCompared(Exception):
    """The plain call offers nothing to compare with."""


class _Family:
    """A model of a family, and what is done with it; each method raises `Wrong` where numbers differ."""

    def __init__(self, model: PreTrainedModel, verdict: Verdict) -> None:
        self.model = model
        self.verdict = verdict
        self.before = model.config.to_dict()
        self.special = sorted(special_ids(model.config))
        num_ids = min(VOCAB, getattr(model.get_output_embeddings(), "out_features", VOCAB))
        self.usable = [token_id for token_id in range(6, num_ids) if token_id not in self.special]
        self.lm: LM | None = None

    def does(self, what: str, run: Callable[[], None]) -> None:
        """Note how something went that is done beside evaluation."""
        try:
            run()
        except NotCompared as error:
            self.verdict.remarks.append(f"{what} not compared: {error}")
        except BackpromptError as error:
            reason = str(error).split(", so ")[0].split(". ")[0].removeprefix(f"{self.verdict.class_name} ")
            self.verdict.remarks.append(f"{what} refused: {' '.join(reason.split())}")
        except Wrong as error:
            self.verdict.status, self.verdict.why = "WRONG", f"{what}: {error}"
        except Exception as error:
            self.verdict.status, self.verdict.why = "RAW", f"{what}: {_one_line(error)}"

    def made(self, **options: Any) -> LM:
        return LM(self.model, word_tokenizer(), **options)

    def evaluates(self, num_texts: int) -> None:
        """Texts of a random tree, in passes of two sizes."""
        for max_tokens in (23, 512):
            self.lm = lm = self.made(max_tokens_per_forward=max_tokens)
            self.verdict.longest = lm.session.limits.model.max_tokens
            self.compare(self.tree(lm, num_texts))
            executor = lm.session.evaluator.executor
            self.verdict.way = "by levels" if getattr(executor, "levels", None) is not None else "packed"

    def tree(self, lm: LM, num_texts: int = 12, seed: int = 0) -> list[Text]:
        """Texts that continue others at random."""
        chance = random.Random(seed)
        longest = min(_LONGEST, self.verdict.longest or _LONGEST)
        texts: list[Text] = []
        while len(texts) < num_texts:
            segment = _string_of(chance.choices(self.usable, k=chance.choice(_LENGTHS)))
            is_alone = not texts or chance.random() < 0.12
            text = Text(segment, lm) if is_alone else chance.choice(texts) + segment
            if len(text.tokens) <= longest:
                texts.append(text)
        return texts

    def compare(self, texts: Sequence[Text]) -> None:
        evaluate(texts)
        for text in texts:
            expected = plain_logits(self.model, text.tokens)
            gap = max(
                _gap(text.model_repr.all_logits(), expected),
                _gap(text.logits, expected[-1]),
                _gap(text.token_logprobs[1:], token_logprobs_of(expected, text.tokens)[1:]),
            )
            self.verdict.gap = max(self.verdict.gap, gap)
            if gap > TOLERANCE:
                raise Wrong(f"{len(text.tokens)} tokens are off by {gap:.1e}")

    def generates(self) -> None:
        for ids in (self.usable[20:23], self.usable[40:51]):
            made = self.text(ids).generate(max_new_tokens=_GENERATED)
            so_far = list(ids)
            for found in made.completion_tokens:
                logits = plain_logits(self.model, so_far)[-1]
                logits[self.refused()] = -torch.inf
                if float(logits.max() - logits[found]) > 1e-3:
                    raise Wrong(f"token {len(so_far) - len(ids)} is {found}, not {int(logits.argmax())}")
                so_far.append(found)
            if len(so_far) < len(ids) + _GENERATED and so_far[-1] not in self.special:
                raise Wrong(f"{len(so_far) - len(ids)} tokens")
            self.compare([made])

    def refused(self) -> list[int]:
        """The ids that evaluation refuses, of those that have a logit."""
        assert self.lm is not None
        executor = self.lm.session.evaluator.executor
        return [token_id for token_id in executor.limits.placeholders if token_id < executor.vocab_size]

    def text(self, ids: Iterable[int]) -> Text:
        assert self.lm is not None
        return Text.from_tokens(list(ids), self.lm)

    def continues_from_caches(self) -> None:
        ids, following = self.usable[30:47], self.usable[3:8]
        expected = plain_logits(self.model, [*ids, *following])[-len(following) :]
        cache = self.text(ids).model_repr.past_key_values()
        gap = _gap(self.continued(following, cache), expected)
        if gap > TOLERANCE:
            with torch.no_grad():
                own = self.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
            if _gap(self.continued(following, own), expected) > TOLERANCE:
                raise NotCompared("the plain call's own cache gives other numbers than the plain call")
            raise Wrong(f"off by {gap:.1e}")

    def continued(self, ids: list[int], cache: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0]
        return logits

    def evaluates_groups(self) -> None:
        """A context, two parts that do not see each other, and a question behind both, under a mask that says so."""
        sizes = 6, 9, 4, 7
        cuts = [sum(sizes[:num]) for num in range(5)]
        ids = random.Random(3).sample(self.usable, cuts[-1])
        context, first, second, question = (ids[a:b] for a, b in itertools.pairwise(cuts))
        start = cuts[1]
        positions = [*range(start), *range(start, cuts[2]), *range(start, start + sizes[2])]
        positions += range(start + max(sizes[1:3]), start + max(sizes[1:3]) + sizes[3])
        visible = torch.ones(len(ids), len(ids)).tril().bool()
        visible[cuts[2] : cuts[3], start : cuts[2]] = False
        expected = self.under_mask(ids, positions, visible)[-1]
        text = self.text(context) + (self.text(first) | self.text(second)) + self.text(question)
        _check_gap(text.logits, expected)

    def under_mask(self, ids: list[int], positions: list[int], visible: Tensor) -> Tensor:
        """The plain call's logits under a mask of its four axes, with positions as its embeddings count them."""
        causal, plain = torch.ones_like(visible).tril(), list(range(len(ids)))
        expected = plain_logits(self.model, ids)
        padding = self.lm.session.limits.model.padding if self.lm is not None else None
        shift = 0 if padding is None else padding + 1
        try:
            found = self.masked_call(ids, plain, shift, causal)
            moved = self.masked_call(ids, [2 * position for position in plain], shift, causal)
            if _gap(found, expected) > TOLERANCE:
                raise NotCompared("the plain call ignores or changes masks")
            if _gap(moved, expected) < TOLERANCE:
                raise NotCompared("the plain call ignores positions")
            return self.masked_call(ids, positions, shift, visible)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise NotCompared(f"no masks of four axes ({type(error).__name__})") from error

    def masked_call(self, ids: list[int], positions: list[int], shift: int, visible: Tensor) -> Tensor:
        config = self.model.config.get_text_config(decoder=True)
        places = torch.tensor(positions)
        kinds = set(getattr(config, "layer_types", None) or [])
        window = getattr(config, "sliding_window", None)

        def mask(of_window: int | None) -> Tensor:
            seen = visible if of_window is None else visible & (places[:, None] - places < of_window)
            return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

        if any("sliding" in kind for kind in kinds):
            given: Any = {kind: mask(window if "sliding" in kind else None) for kind in kinds}
        else:
            given = mask(None if kinds else window)
        with torch.no_grad():
            call = {"input_ids": torch.tensor([ids]), "position_ids": places[None] + shift, "attention_mask": given}
            logits: Tensor = self.model(**call).logits[0]
        return logits

    def evaluates_special_ids(self) -> None:
        ids = self.special[:6]
        if not ids:
            return
        root = self.text([self.usable[0], *ids[:3], self.usable[1]])
        self.compare([root, root + _string_of([self.usable[5], *ids[3:], self.usable[7]])])

    def left_the_configuration_alone(self) -> None:
        if self.model.config.to_dict() != self.before:
            raise Wrong("the configuration has changed")

    def evaluates_with_packed_weights(self) -> None:
        self.compare(self.tree(self.made(max_tokens_per_forward=40, pack_weights=True), seed=1))

    def ends_where_it_must(self) -> None:
        """Texts around the length that the model was made for: the plain call's numbers, or an error of ours."""
        chance = random.Random(11)
        for beyond in (False, True):
            lm = self.made(max_tokens_per_forward=50, beyond_trained_length=beyond)
            root = chance.choices(self.usable, k=min(POSITIONS, self.verdict.longest or POSITIONS) - 7)
            for num_more in (6, 7, 8, 40):
                more = chance.choices(self.usable, k=num_more)
                try:
                    evaluate([text := Text.from_tokens([*root, *more], lm)])
                except BackpromptError:
                    continue
                self.compare([text])


def _string_of(ids: Iterable[int]) -> str:
    return "".join(f" w{token_id}" for token_id in ids)


def _check_gap(found: Tensor, expected: Tensor) -> None:
    gap = _gap(found, expected)
    if gap > TOLERANCE:
        raise Wrong(f"off by {gap:.1e}")


def _gap(found: Tensor, expected: Tensor) -> float:
    """The largest gap, relative to the largest number above 1; infinite where one is not finite and the other is."""
    are_finite = expected.isfinite()
    if found.shape != expected.shape or not torch.equal(found.isfinite(), are_finite):
        return float("inf")
    if not are_finite.any():
        return 0.0
    found, expected = found[are_finite].double(), expected[are_finite].double()
    return float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]

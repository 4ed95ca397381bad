"""Is an answer supported by the document? The attention that the answer's tokens pay to the document tells.

    document + question ├── answer with support       attention of the answer's tokens, by layer and head:
                        └── answer without            the share that goes to the document

40 documents, each with a question and two answers. On half of the documents heads are chosen by mutual information, and
a logistic regression with its threshold is fitted; the number of heads and their layers are chosen there as well, by
cross-validation in 20 runs. The best choice is then tried once on the other half. All keys are held, so a run forwards
the tokens of the answers alone, and nothing if another run has asked for the same weights.

    python -m pip install scikit-learn
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, TunedThresholdClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from backprompt import LM, Text, evaluate
from demo_model import add_model_argument, load_model

DATA = Path(__file__).parent / "data" / "grounding.tsv"
NUMS_HEADS = (1, 2, 4, 8, 16)
NUM_FOLDS = 4
NUM_RESAMPLES = 1000
NUM_PLAIN_CALLS = 8


@dataclass(frozen=True)
class Answer:
    """An answer to a question about a document."""

    document_idx: int
    document: str
    question: str
    string: str
    is_supported: bool


@dataclass(frozen=True)
class Asked:
    """An answer as a text, and the places of document and answer in its tokens."""

    text: Text
    document: slice
    answer: slice


@dataclass(frozen=True)
class Cases:
    """Answers with features, `(answers, features)`; whether each has support, and the number of its document."""

    features: np.ndarray
    is_supported: np.ndarray
    documents: np.ndarray

    def part(self, chosen: np.ndarray) -> Cases:
        return Cases(self.features[chosen], self.is_supported[chosen], self.documents[chosen])

    def folds(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The training and test answers of each fold, those of one document together."""
        return list(GroupKFold(NUM_FOLDS).split(self.features, self.is_supported, self.documents))

    def with_best(self, order: np.ndarray, num_features: int) -> Cases:
        """The same with the first features in an order."""
        return Cases(self.features[:, order[:num_features]], self.is_supported, self.documents)


class Runs:
    """Asks for attention, and counts the tokens and seconds."""

    def __init__(self, lm: LM, asked: Sequence[Asked]) -> None:
        self.lm = lm
        self.asked = asked
        self.num_runs = self.num_tokens = 0
        self.seconds = 0.0

    def document_shares(self, layers: range) -> np.ndarray:
        """The share of attention that answers pay to documents, the mean over tokens, (answers, layers x heads)."""
        before, begin = self.lm.stats, time.perf_counter()
        shares = [one.text.model_repr.attention(layers, rows=one.answer, over=[one.document]) for one in self.asked]
        self.num_runs += 1
        self.num_tokens += (self.lm.stats - before).tokens_computed
        self.seconds += time.perf_counter() - begin
        return np.stack([share.mean(dim=(2, 3)).flatten().numpy() for share in shares])  # (layers, heads, rows, 1)


def read_answers(path: Path = DATA) -> list[Answer]:
    answers = []
    for idx, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        document, question, *strings = line.split("\t")
        answers += [Answer(idx, document, question, string, string is strings[0]) for string in strings]
    return answers


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_argument(parser)
    lm = load_model(parser.parse_args(argv).model)
    answers = read_answers()
    asked = build(lm, answers)
    documents = np.array([answer.document_idx for answer in answers])
    num_documents = documents.max() + 1
    is_training = np.isin(documents, np.random.default_rng(0).permutation(num_documents)[: num_documents // 2])
    print(f"{len(answers)} answers to questions about {num_documents} documents, half of them without support.\n")

    def cases(features: np.ndarray) -> Cases:
        return Cases(features, np.array([answer.is_supported for answer in answers]), documents)

    begin = time.perf_counter()
    evaluate([one.text for one in asked])
    num_evaluated, seconds_evaluated = lm.stats.tokens_computed, time.perf_counter() - begin
    runs = Runs(lm, asked)
    scores = {}
    for name, layers in layers_of(lm).items():
        orders: list[np.ndarray] = []  # the same for any number of heads
        for num_heads in NUMS_HEADS:
            training = cases(runs.document_shares(layers)).part(is_training)
            orders = orders or [most_informative(training.part(train)) for train, _ in training.folds()]
            scores[name, num_heads] = cross_validated(training, orders, num_heads)
    print("Balanced accuracy in cross-validation on the training half, by the number of heads:")
    print(f"{'':<20}" + "".join(f"{num_heads:>7}" for num_heads in NUMS_HEADS))
    for name in layers_of(lm):
        print(f"{name:<20}" + "".join(f"{scores[name, num_heads]:>7.2f}" for num_heads in NUMS_HEADS))
    name, num_heads = max(scores, key=lambda setting: scores[setting])
    print(f"The best: {num_heads} of the heads in {name}.\n")

    layers = layers_of(lm)[name]
    shares = cases(Runs(lm, asked).document_shares(layers))
    order = most_informative(shares.part(is_training))
    best = shares.with_best(order, num_heads)
    print_heads(best.part(is_training), order[:num_heads], layers, shares.features.shape[1] // len(layers))
    likely = cases(np.array([[float(one.text.token_logprobs[one.answer].mean())] for one in asked]))
    print(f"\n{f'On the other half, {np.sum(~is_training)} answers':<38}balanced accuracy   95% interval")
    for title, features in (("attention to the document", best), ("mean log-probability of the answer", likely)):
        print_result(title, features.part(is_training), features.part(~is_training))
    print_work(runs, num_evaluated, seconds_evaluated)


def build(lm: LM, answers: Sequence[Answer]) -> list[Asked]:
    """The texts of the answers; those of one document share all tokens before the answer."""
    texts = [
        Text(answer.document, lm) + f"\n\nQuestion: {answer.question}\nAnswer:" + f" {answer.string}"
        for answer in answers
    ]
    return [
        Asked(text, slice(document.start, document.stop), slice(answer.start, answer.stop))
        for text, (document, _, answer) in zip(texts, lm.extents(texts), strict=True)
    ]


def layers_of(lm: LM) -> dict[str, range]:
    """Ranges of layers, by name."""
    num_layers = lm.model.config.num_hidden_layers
    quarter, half = num_layers // 4, num_layers // 2
    return {
        "all layers": range(num_layers),
        "the first half": range(half),
        "the middle half": range(quarter, num_layers - quarter),
        "the last half": range(half, num_layers),
    }


def most_informative(cases: Cases) -> np.ndarray:
    """The features in falling order of their mutual information with support."""
    information = mutual_info_classif(cases.features, cases.is_supported, random_state=0)
    return np.argsort(-information, kind="stable")


def fitted(cases: Cases) -> TunedThresholdClassifierCV:
    """A logistic regression whose threshold is chosen by cross-validation over documents."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression())
    tuned = TunedThresholdClassifierCV(classifier, scoring="balanced_accuracy", thresholds=20, cv=cases.folds())
    return tuned.fit(cases.features, cases.is_supported)


def cross_validated(cases: Cases, orders: Sequence[np.ndarray], num_heads: int) -> float:
    """The balanced accuracy on documents that were left out, heads and threshold chosen without them."""
    predicted = np.zeros_like(cases.is_supported)
    for (train, test), order in zip(cases.folds(), orders, strict=True):
        best = cases.with_best(order, num_heads)
        predicted[test] = fitted(best.part(train)).predict(best.features[test])
    return balanced_accuracy_score(cases.is_supported, predicted)


def print_heads(cases: Cases, chosen: np.ndarray, layers: range, num_heads: int) -> None:
    """Print the chosen heads, and what they pay to documents on the training half."""
    print("share of attention that an answer pays to its document")
    print("head           with support   without")
    for feature, shares in zip(chosen.tolist(), cases.features.T, strict=True):
        layer, head = divmod(feature, num_heads)
        supported, unsupported = (shares[cases.is_supported == label].mean() for label in (True, False))
        print(f"layer {layers[layer]:>2}, {head:<6}{supported:>12.2f}{unsupported:>10.2f}")


def print_result(title: str, training: Cases, others: Cases) -> None:
    """Print the balanced accuracy on the other half."""
    predicted = fitted(training).predict(others.features)
    accuracy = balanced_accuracy_score(others.is_supported, predicted)
    low, high = interval(others, predicted)
    print(f"{title:<38}{accuracy:>17.2f}   {low:.2f} to {high:.2f}")


def interval(cases: Cases, predicted: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the balanced accuracy by the bootstrap over documents, whose answers go together."""
    rng, names = np.random.default_rng(0), np.unique(cases.documents)
    answers_of = {name: np.flatnonzero(cases.documents == name) for name in names.tolist()}
    found = []
    for _ in range(NUM_RESAMPLES):
        drawn = np.concatenate([answers_of[name] for name in rng.choice(names, len(names)).tolist()])
        found.append(balanced_accuracy_score(cases.is_supported[drawn], predicted[drawn]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def print_work(runs: Runs, num_evaluated: int, seconds_evaluated: float) -> None:
    """Print the work for the attention of all runs, and that of as many plain calls, estimated from a few."""
    some = runs.asked[:: max(1, len(runs.asked) // NUM_PLAIN_CALLS)]
    plain_seconds, gap = plain_calls(runs.lm, some)
    num_plain = runs.num_runs * sum(len(one.text.tokens) for one in runs.asked)
    plain_seconds *= num_plain / sum(len(one.text.tokens) for one in some)
    print(f"\n{f'attention for {runs.num_runs} runs':<38}tokens forwarded   seconds")
    print(
        f"{'plain calls, output_attentions=True':<38}{num_plain:>16,}{plain_seconds:>10.1f}  as {len(some)} calls took"
    )
    print(f"{'backprompt: the texts, once':<38}{num_evaluated:>16,}{seconds_evaluated:>10.1f}")
    print(f"{'backprompt: tokens of answers again':<38}{runs.num_tokens:>16,}{runs.seconds:>10.1f}")
    print(f"Largest gap in shares to the plain call: {gap:.0e}.")


@torch.no_grad()
def plain_calls(lm: LM, asked: Sequence[Asked]) -> tuple[float, float]:
    """The seconds of plain calls in eager attention, and the largest gap of the library's shares to theirs."""
    model = copy.deepcopy(lm.model, {id(parameter): parameter for parameter in lm.model.parameters()})
    model.set_attn_implementation("eager")
    seconds, gaps = 0.0, []
    for one in asked:
        begin = time.perf_counter()
        weights = torch.cat(model(torch.tensor([one.text.tokens]), output_attentions=True).attentions)
        seconds += time.perf_counter() - begin
        expected = weights[:, :, one.answer, one.document].sum(dim=-1, keepdim=True)
        found = one.text.model_repr.attention(rows=one.answer, over=[one.document])
        gaps.append(float((found - expected).abs().max()))
    return seconds, max(gaps)


if __name__ == "__main__":
    main()

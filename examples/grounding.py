"""Is an answer supported by the document? Told by the attention that the answer's tokens pay to the document.

    document + question ├── answer with support       attention of the answer's tokens, by layer and head:
                        └── answer without            the share that goes to the document

40 documents, each with a question and two answers. On half of the documents, heads are chosen by mutual information,
and a logistic regression and its threshold are fitted; how many and in which layers is chosen there as well, by
cross-validation. The best choice is then tried once on the other half. The search runs 20 times over the same texts:
the keys of all tokens are held, so a run forwards the tokens of the answers alone, or nothing if the last run asked
for the same.

    python -m pip install scikit-learn
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_selection import SelectKBest, mutual_info_classif
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
NUM_RESAMPLES = 2000


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
    """An answer as a text, and its parts in tokens."""

    text: Text
    document: slice
    answer: slice


def read_answers(path: Path = DATA) -> list[Answer]:
    answers = []
    for idx, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        document, question, supported, unsupported = line.split("\t")
        answers += [
            Answer(idx, document, question, supported, True),
            Answer(idx, document, question, unsupported, False),
        ]
    return answers


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_argument(parser)
    lm = load_model(parser.parse_args(argv).model)
    answers = read_answers()
    asked = build(lm, answers)
    labels = np.array([answer.is_supported for answer in answers])
    documents = np.array([answer.document_idx for answer in answers])
    is_training = np.isin(documents, np.random.default_rng(0).permutation(documents.max() + 1)[: len(answers) // 4])
    print(f"{len(answers)} answers to questions about {documents.max() + 1} documents, half of them without support.\n")

    settings = list(product(layers_of(lm), NUMS_HEADS))
    before, begin = lm.stats, time.perf_counter()
    evaluate([one.text for one in asked])
    held = lm.stats
    scores = {}
    for name, num_heads in settings:
        shares = document_shares(asked, layers_of(lm)[name])
        scores[name, num_heads] = cross_validated(
            shares[is_training], labels[is_training], documents[is_training], num_heads
        )
    work, seconds = lm.stats, time.perf_counter() - begin

    print("Balanced accuracy in cross-validation on the training half, by the number of heads:")
    print(f"{'':<20}" + "".join(f"{num_heads:>7}" for num_heads in NUMS_HEADS))
    for name in layers_of(lm):
        print(f"{name:<20}" + "".join(f"{scores[name, num_heads]:>7.2f}" for num_heads in NUMS_HEADS))
    name, num_heads = max(scores, key=lambda setting: scores[setting])
    print(f"The best: {num_heads} heads of {name}.\n")

    shares = document_shares(asked, layers_of(lm)[name])
    model = fitted(shares[is_training], labels[is_training], documents[is_training], num_heads)
    print_heads(model, shares[is_training], labels[is_training], list(layers_of(lm)[name]))
    likely = mean_logprobs(asked)
    by_likelihood = fitted(likely[is_training], labels[is_training], documents[is_training], 1)
    print(f"\nOn the other half, {np.sum(~is_training)} answers{'':<12}balanced accuracy   95% interval")
    for title, found, features in (
        ("attention to the document", model, shares),
        ("log-probability of the answer", by_likelihood, likely),
    ):
        predicted = found.predict(features[~is_training])
        accuracy = balanced_accuracy_score(labels[~is_training], predicted)
        low, high = interval(labels[~is_training], predicted, documents[~is_training])
        print(f"{title:<38}{accuracy:>17.2f}   {low:.2f} to {high:.2f}")
    print_savings(lm, asked, len(settings), (before, held, work), seconds)


def build(lm: LM, answers: Sequence[Answer]) -> list[Asked]:
    """The texts of the answers; those of one document share all tokens before the answer."""
    asked = []
    for answer in answers:
        prompt = Text(answer.document, lm) + f"\n\nQuestion: {answer.question}\nAnswer:"
        asked.append(prompt + f" {answer.string}")
    return [
        Asked(text, *(slice(e.start, e.stop) for e in (of[0], of[-1])))
        for text, of in zip(asked, lm.extents(asked), strict=True)
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


def document_shares(asked: Sequence[Asked], layers: range) -> np.ndarray:
    """The share of attention that an answer pays to its document, the mean over its tokens: (answers, layers x heads)."""
    shares = [one.text.model_repr.attention(layers, rows=one.answer, over=[one.document]) for one in asked]
    return np.stack([share.mean(dim=(2, 3)).flatten().numpy() for share in shares])  # (layers, heads, rows, 1) each


def mean_logprobs(asked: Sequence[Asked]) -> np.ndarray:
    """The mean log-probability of an answer's tokens, (answers, 1)."""
    return np.array([[float(one.text.token_logprobs[one.answer].mean())] for one in asked])


def fitted(
    features: np.ndarray, labels: np.ndarray, documents: np.ndarray, num_heads: int
) -> TunedThresholdClassifierCV:
    """A classifier by the most informative features, its threshold chosen by cross-validation over documents."""
    classifier = make_pipeline(
        SelectKBest(partial(mutual_info_classif, random_state=0), k=min(num_heads, features.shape[1])),
        StandardScaler(),
        LogisticRegression(),
    )
    folds = list(GroupKFold(NUM_FOLDS).split(features, labels, documents))
    return TunedThresholdClassifierCV(classifier, scoring="balanced_accuracy", cv=folds).fit(features, labels)


def cross_validated(features: np.ndarray, labels: np.ndarray, documents: np.ndarray, num_heads: int) -> float:
    """The balanced accuracy on documents that were left out, heads and threshold chosen without them."""
    predicted = np.zeros_like(labels)
    for train, test in GroupKFold(NUM_FOLDS).split(features, labels, documents):
        predicted[test] = fitted(features[train], labels[train], documents[train], num_heads).predict(features[test])
    return balanced_accuracy_score(labels, predicted)


def interval(labels: np.ndarray, predicted: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the balanced accuracy by the bootstrap over documents, whose answers go together."""
    rng, names = np.random.default_rng(0), np.unique(documents)
    found = []
    for _ in range(NUM_RESAMPLES):
        drawn = np.concatenate([np.flatnonzero(documents == name) for name in rng.choice(names, len(names))])
        found.append(balanced_accuracy_score(labels[drawn], predicted[drawn]))
    return tuple(np.quantile(found, [0.025, 0.975]))


def print_heads(model: TunedThresholdClassifierCV, shares: np.ndarray, labels: np.ndarray, layers: list[int]) -> None:
    """Print the chosen heads, and what they pay to documents on the training half."""
    chosen = model.estimator_.named_steps["selectkbest"].get_support(indices=True)
    num_heads = shares.shape[1] // len(layers)
    print("head           share of attention that goes to the document")
    print("               with support   without")
    for feature in chosen:
        layer, head = divmod(int(feature), num_heads)
        supported, unsupported = (shares[labels == label, feature].mean() for label in (True, False))
        print(f"layer {layers[layer]:>2}, {head:<5}{supported:>12.2f}{unsupported:>10.2f}")
    print(f"Supported from probability {model.best_threshold_:.2f} on.")


def print_savings(lm: LM, asked: Sequence[Asked], num_runs: int, stats: tuple, seconds: float) -> None:
    """Print the work of all runs, and that of as many plain calls, estimated from a few."""
    before, held, after = stats
    some = asked[:: max(1, len(asked) // 8)]
    plain_seconds, gap = plain_calls(lm, some)
    num_tokens = sum(len(one.text.tokens) for one in asked)
    some_tokens = sum(len(one.text.tokens) for one in some)
    print(f"\n{num_runs} runs over the {len(asked)} texts{'':<10}tokens forwarded   seconds")
    print(
        f"{'plain calls, output_attentions=True':<34}{num_runs * num_tokens:>12,}{num_runs * plain_seconds * num_tokens / some_tokens:>10.1f}  estimated from {len(some)} calls"
    )
    print(
        f"{'backprompt':<34}{after.tokens_computed - before.tokens_computed:>12,}{seconds:>10.1f}  fits of all runs included"
    )
    print(f"{'  of these, the texts':<34}{held.tokens_computed - before.tokens_computed:>12,}")
    print(f"{'  of these, rows of answers again':<34}{after.tokens_computed - held.tokens_computed:>12,}")
    print(f"Largest gap in shares to the plain call: {gap:.0e}.")


@torch.no_grad()
def plain_calls(lm: LM, asked: Sequence[Asked]) -> tuple[float, float]:
    """The seconds of plain calls in eager attention, and the largest gap of the library's shares to theirs."""
    model = copy.deepcopy(lm.model, {id(parameter): parameter for parameter in lm.model.parameters()})
    model.set_attn_implementation("eager")
    begin = time.perf_counter()
    plain = [torch.cat(model(torch.tensor([one.text.tokens]), output_attentions=True).attentions) for one in asked]
    seconds = time.perf_counter() - begin
    gaps = []
    for one, weights in zip(asked, plain, strict=True):
        expected = weights[:, :, one.answer, one.document].sum(dim=-1, keepdim=True)
        found = one.text.model_repr.attention(rows=one.answer, over=[one.document])
        gaps.append(float((found - expected).abs().max()))
    return seconds, max(gaps)


if __name__ == "__main__":
    main()

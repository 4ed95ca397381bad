"""The examples run offline with a tiny model and count what they say they count; their data is what they say it is.

Numbers that depend on a real model (accuracy, seconds) are not looked at here.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from backprompt import Text, load
from comparing import assert_close, num_distinct, num_distinct_ids
from reference import ATOL, plain_logits, plain_token_logprobs
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Imports an example by its name, as a module of another name: one is called as a package that others import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(EXAMPLES)])

        def load_example(name: str) -> ModuleType:
            spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, module)  # where dataclasses look for it
            spec.loader.exec_module(module)
            return module

        yield load_example
        for name in ("demo_model", "intents", "plain"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens are little more than bytes, with positions enough for the manual."""
    folder = tmp_path_factory.mktemp("tiny")
    model = build("llama")
    model.config.max_position_embeddings = 8192  # rotary positions: no weight depends on it
    model.save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    return folder


# hello_there.py


def test_hello_there(
    example: Callable[[str], ModuleType], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("hello_there").main(["--model", str(model_folder)])
    printed = capsys.readouterr().out
    context = Text("Hello there.", load(model_folder))
    texts = [context + name + end for name in (" Senator", " General") for end in (" Amidala", " Kenobi...")]
    num_tokens = sum(len(text.tokens) for text in texts)
    assert "tokens computed so far: 0" in printed
    assert all(repr(text.string) in printed for text in texts)
    assert f"Tokens in all strings: {num_tokens}; computed: {num_distinct(texts)}." in printed
    assert f"{num_distinct([*texts, context + ' General' + ' Grievous']) - num_distinct(texts)} more." in printed


# shared_context.py


def test_requests_share_the_manual(
    example: Callable[[str], ModuleType], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = example("shared_context")
    lm = load(model_folder)
    questions = [f"\n\nQuestion: {question}\nAnswer:" for question in requests.QUESTIONS[:6]]
    runs = requests.run_all(lm, questions)
    plain, one_at_a_time, together = runs.values()
    texts = [Text(requests.MANUAL, lm) + question for question in questions]
    assert plain.tokens_computed == sum(len(text.tokens) for text in texts)
    assert together.tokens_computed == one_at_a_time.tokens_computed == num_distinct(texts)
    assert together.bytes_held == one_at_a_time.bytes_held == lm.stats.bytes_held
    expected = torch.stack([plain_logits(lm.model, text.tokens)[-1] for text in texts])
    for run in (plain, one_at_a_time, together):
        assert_close(run.logits, expected)

    requests.print_table(lm, questions, runs)
    printed = capsys.readouterr().out
    assert f"{together.tokens_computed:,}" in printed
    assert f"{together.bytes_held:,} bytes" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_there_are_twenty_requests(example: Callable[[str], ModuleType]) -> None:
    requests = example("shared_context")
    assert len(set(requests.QUESTIONS)) == 20
    assert 400 <= len(requests.MANUAL.split()) <= 1000


# intents.py


def test_a_question_commands_no_terminal(
    example: Callable[[str], ModuleType], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intents = example("intents")
    lm = load(str(model_folder))
    intent = next(iter(intents.INTENTS))
    (tmp_path / "questions.tsv").write_text(f"Where\x1b[31m is \u202eit?\t{intent}\n")
    questions = intents.read_questions(tmp_path / "questions.tsv")
    intents.print_predictions(intents.score_tree(lm, intents.build_tree(lm, intents.SHOTS[:1], questions)), questions)
    assert "Where\\x1b[31m is \\u202eit?" in capsys.readouterr().out


def test_intents_tree_is_scored_as_plain_calls_would(example: Callable[[str], ModuleType], model_folder: Path) -> None:
    intents = example("intents")
    lm = load(model_folder)
    questions = intents.read_questions(EXAMPLES / "data" / "questions.tsv")[:3]
    tree = intents.build_tree(lm, intents.SHOTS, questions)
    assert len(tree.leaves) == 3 * 12
    assert lm.stats.tokens_computed == 0

    scored = intents.score_tree(lm, tree)
    assert scored.stats.tokens_requested == sum(len(text.tokens) for text in tree.leaves)
    assert scored.stats.tokens_computed == num_distinct(tree.leaves)
    logprobs = scored.logprobs.flatten()
    for leaf_idx in (0, 17, 35):
        prompt, leaf = tree.prompts[leaf_idx // 12], tree.leaves[leaf_idx]
        assert leaf.tokens[: len(prompt.tokens)] == prompt.tokens
        expected = plain_token_logprobs(lm.model, leaf.tokens)[len(prompt.tokens) :]
        assert_close(logprobs[leaf_idx], expected.sum(), atol=len(expected) * ATOL[torch.float32])
    torch.testing.assert_close(scored.probabilities.sum(dim=1), torch.ones(3))
    assert intents.largest_gap(lm, tree.leaves[::12]) <= ATOL[torch.float32]


def test_plain_batches_score_what_single_calls_score(example: Callable[[str], ModuleType], model_folder: Path) -> None:
    intents = example("intents")
    import plain  # found where `example` put the examples

    lm = load(model_folder)
    questions = intents.read_questions(EXAMPLES / "data" / "questions.tsv")[:2]
    tree = intents.build_tree(lm, intents.SHOTS[:1], questions)
    texts = intents.continue_prompts(tree, lm.evaluate(tree.leaves))
    batches = plain.sorted_batches(texts, batch_size=5)
    assert sorted(text.token_ids for batch in batches for text in batch) == sorted(text.tokens for text in tree.leaves)
    for batch in batches:
        for text, scored in zip(batch, plain.score_batch(lm.model, batch), strict=True):
            expected = plain_token_logprobs(lm.model, text.token_ids)[text.start :]
            assert_close(scored, expected.sum(), atol=len(expected) * ATOL[torch.float32])
    estimate = plain.estimate_seconds(lm.model, batches, batches_run=2)
    assert (estimate.batches_run, estimate.batches) == (2, 5)
    assert estimate.seconds > estimate.seconds_run > 0


def test_intents_prints_what_is_recomputed(
    example: Callable[[str], ModuleType], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    intents = example("intents")
    lines = (EXAMPLES / "data" / "questions.tsv").read_text(encoding="utf-8").splitlines()[:4]
    few_questions = tmp_path / "questions.tsv"
    few_questions.write_text("\n".join(lines), encoding="utf-8")
    intents.main(["--model", str(model_folder), "--questions", str(few_questions), "--plain-batches", "1"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100

    lm = load(model_folder)
    questions = intents.read_questions(few_questions)
    tree = intents.build_tree(lm, intents.SHOTS, questions)
    shots = [*intents.SHOTS[:4], intents.CHANGED_SHOT, *intents.SHOTS[5:]]
    changed = intents.build_tree(lm, shots, questions)
    first, both = num_distinct(tree.leaves), num_distinct(tree.leaves + changed.leaves)
    kept = num_distinct(changed.leaves) - (both - first)
    rest_of_shots = len(changed.context.tokens) - kept
    assert "8 shots, 4 questions, 12 intents: 48 texts." in printed
    assert f" {first:,}  1 in " in printed
    assert f" {kept:,}  the instruction, the shots before it" in printed
    assert f" {rest_of_shots:,}  the rest of it" in printed
    assert f" {both - first - rest_of_shots:,}  questions and intents" in printed
    assert " 0  in 0 forward passes" in printed


def test_unknown_intents_are_refused(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "questions.tsv").write_text("where is it\tfind it\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="not find it"):
        example("intents").read_questions(tmp_path / "questions.tsv")


def test_intents_data(example: Callable[[str], ModuleType]) -> None:
    intents = example("intents")
    questions = intents.read_questions(EXAMPLES / "data" / "questions.tsv")
    tuning_questions = intents.read_questions(EXAMPLES / "data" / "tuning_questions.tsv")
    shots = [*intents.SHOTS, intents.CHANGED_SHOT]
    assert (len(questions), len(intents.INTENTS), len(intents.SHOTS)) == (40, 12, 8)
    assert {question.intent for question in questions} == set(intents.INTENTS)
    assert {shot.intent for shot in shots} <= set(intents.INTENTS)
    assert sum(question.intent == "none of these" for question in questions) == 2

    strings = [question.string.casefold() for question in [*questions, *tuning_questions, *shots]]
    assert len(set(strings)) == len(strings), "the shots, the questions and those the prompt was chosen on are apart"
    completions = [f" {keywords}\n" for keywords in intents.INTENTS.values()]
    assert len(set(completions)) == len(completions)
    assert intents.SHOTS[intents.CHANGED_SHOT_IDX] != intents.CHANGED_SHOT
    assert all(len(name.split()) > 1 for name in intents.INTENTS)


# demo_model.py


class _Saved:
    """Stands for AutoTokenizer and AutoModelForCausalLM; what it loads saves itself as an empty file."""

    def __init__(self, file_name: str, error: BaseException | None = None) -> None:
        self._file_name, self._error = file_name, error

    def from_pretrained(self, *args: object, **options: object) -> "_Saved":
        return self

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / self._file_name).touch()
        if self._error is not None:
            raise self._error


def test_the_demo_model_appears_complete_or_not_at_all(
    example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_model = example("demo_model")
    monkeypatch.setattr(demo_model, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(demo_model, "_gguf_folder", lambda: tmp_path)
    monkeypatch.setattr(demo_model, "AutoTokenizer", _Saved("tokenizer.json"))
    monkeypatch.setattr(demo_model, "AutoModelForCausalLM", _Saved("model", error=KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        demo_model.demo_model_folder()
    assert list((tmp_path / "cache").iterdir()) == []

    monkeypatch.setattr(demo_model, "AutoModelForCausalLM", _Saved("model"))
    folder = demo_model.demo_model_folder()
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "tokenizer.json"]

    monkeypatch.setattr(demo_model, "AutoTokenizer", None)  # not asked a second time
    assert demo_model.demo_model_folder() == folder


def test_a_missing_demo_model_says_how_to_get_it(
    example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_model = example("demo_model")
    monkeypatch.setattr(demo_model, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="make demo"):
        demo_model.load_model(None)


# draw_meme.py


def test_the_meme_is_what_its_script_draws(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from PIL import ImageChops, ImageStat

    example("draw_meme").main(["--output", str(tmp_path / "meme.jpg")])
    with image.open(tmp_path / "meme.jpg") as drawn, image.open(EXAMPLES.parent / "meme.jpg") as committed:
        assert drawn.size == committed.size
        assert max(ImageStat.Stat(ImageChops.difference(drawn, committed)).mean) < 2  # of 255


# shots_on_the_fly.py


def test_shots_on_the_fly(
    example: Callable[[str], ModuleType], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Side by side each shot is computed once, whatever it stands next to."""
    module = example("shots_on_the_fly")
    module.main(["--model", str(model_folder), "--questions", "3"])
    printed = capsys.readouterr().out
    assert printed.count("3 texts: mean divergence") == 2
    computed = {
        name: int(line.removeprefix(name).split()[1].replace(",", ""))
        for name in module.ARRANGEMENTS
        for line in printed.splitlines()
        if line.startswith(name) and "divergence" not in line
    }
    assert computed["parallel, shared positions"] < computed["one after the other"]


# tune_a_prompt.py


def test_tune_a_prompt_computes_each_token_once(
    example: Callable[[str], ModuleType],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from sklearn.base import clone

    tune_a_prompt = example("tune_a_prompt")
    grid = {"calibrate_on": [None], "template": tune_a_prompt.GRID["template"][:2], "shots": [0, 2]}
    monkeypatch.setattr(tune_a_prompt, "GRID", grid)
    lines = (EXAMPLES / "data" / "tuning_questions.tsv").read_text(encoding="utf-8").splitlines()
    for name in ("tuning_questions.tsv", "questions.tsv"):
        (tmp_path / name).write_text("\n".join(lines[::2]), encoding="utf-8")
    monkeypatch.setattr(tune_a_prompt, "DATA", tmp_path)
    tune_a_prompt.main(["--model", str(model_folder)])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120

    lm = load(model_folder)
    tuning = tune_a_prompt.read_messages("tuning_questions.tsv")
    messages, desks = tuning.strings, tuning.desks
    search = tune_a_prompt.tune(lm, tuning)
    leaves, scores = [], []
    for params in search.cv_results_["params"]:
        candidate = clone(search.estimator).set_params(**params)
        right = 0
        for train, test in tune_a_prompt.FOLDS.split(messages, desks):
            fitted = candidate.fit(messages[train], desks[train])
            completions = [  # but for the last tokens, which are scored and not forwarded
                Text.from_tokens(ids[:-1], lm)
                for ids in lm.session.completion_ids([f" {c}" for c in fitted.completions_])
            ]
            leaves += [prompt + completion for prompt in fitted.prompts(messages[test]) for completion in completions]
            right += (fitted.predict(messages[test]) == desks[test]).sum()
        scores.append(right / len(messages))
    assert search.cv_results_["mean_test_score"] == pytest.approx(scores)
    assert f" {num_distinct(leaves):,}  1 in " in printed
    assert re.search(r"for a second search +0\n", printed)
    for template in grid["template"]:
        row = [
            score for score, p in zip(scores, search.cv_results_["params"], strict=True) if p["template"] == template
        ]
        assert f"{template!r:<34}" + "".join(f"{score:>7.2f}" for score in row) + "\n" in printed


def test_every_intent_has_a_desk(example: Callable[[str], ModuleType]) -> None:
    tune_a_prompt, intents = example("tune_a_prompt"), example("intents")
    assert set(tune_a_prompt.DESK_OF_INTENT) == set(intents.INTENTS)
    assert sum(len(desk.intents) for desk in tune_a_prompt.DESKS.values()) == len(intents.INTENTS)


# chat.py


def test_a_chat_goes_back_without_computing_anything_twice(
    example: Callable[[str], ModuleType],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lm = load(model_folder)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    chat = example("chat")
    monkeypatch.setattr(chat, "load_model", lambda name: lm)
    lines = iter(
        ["/turns", "Who?", "Where?", "/turns", "/back 1", "When?", "/again", "/back 7", "/back", "/huh", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main(["--max-new-tokens", "8"])
    printed = capsys.readouterr().out
    assert "No turns yet." in printed
    assert re.search(r"\n1  'Who\?': .*\n2  'Where\?': ", printed)
    computed = [int(number) for number in re.findall(r"\[(\d+) tokens computed", printed)]
    assert len(computed) == 4
    assert computed[3] == 0  # the same answer again
    assert sum(computed) == lm.stats.tokens_computed
    assert lm.stats.tokens_recomputed == 0
    # A turn adds its question, the template around it, and the answer except its last token.
    assert all(number < 60 for number in computed[1:])
    assert printed.count("Write, for example, /back 1.") == 2
    assert printed.count(chat.HELP) == 2


# grpo.py


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*pin_memory:UserWarning")
def test_grpo(
    example: Callable[[str], ModuleType], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "with_end"
    model = build("llama")
    model.config.max_position_embeddings = 8192
    model.save_pretrained(folder)
    tokenizer = byte_level_bpe()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(folder)
    example("grpo").main(["--model", str(folder), "--steps", "1"])
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("   1 "))
    reward, own_loss, loss, own_gradient, gradient = map(float, row[1:])
    assert 0 <= reward <= 1
    assert loss == pytest.approx(own_loss, abs=1e-5)
    assert gradient == pytest.approx(own_gradient, rel=1e-3)
    given, forwarded = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:in the batch|forwarded)", printed)
    )
    assert forwarded < given / 4


# judges.py


def test_three_adapters_answer_behind_one_manual(
    example: Callable[[str], ModuleType], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manual is computed once for all adapters, and once for each in whole runs."""
    judges = example("judges")
    judges.main(["--model", str(model_folder), "--steps", "1"])
    printed = capsys.readouterr().out
    lm = load(model_folder)
    manual = Text(judges.MANUAL, lm)
    num_forwarded = num_distinct_ids(Text(answer, lm).tokens[:-1] for answer in judges.ANSWERS)  # no last token is

    def num_behind(name: str) -> int:
        prompts = [manual + judges.asked(request, name) for request in judges.NEW]
        return num_distinct(prompts) - len(manual.tokens) + len(prompts) * num_forwarded

    nums_behind = [num_behind(name) for name in judges.QUESTIONS]
    shared, whole = (re.search(rf"{line} +([\d,]+)", printed) for line in ("one shared manual", "runs, one an adapter"))
    assert shared is not None
    assert whole is not None
    assert int(shared[1].replace(",", "")) == len(manual.tokens) + sum(nums_behind)
    assert int(whole[1].replace(",", "")) == 3 * len(manual.tokens) + sum(nums_behind)
    gap = re.search(r"cache: (\S+)\.$", printed)
    assert gap is not None
    assert float(gap[1]) <= ATOL[torch.float32]
    assert max(map(len, printed.splitlines())) <= 100


# grounding.py


def test_grounding_forwards_answers_again_and_nothing_else(
    example: Callable[[str], ModuleType], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four of the twenty runs ask for something new: a range of layers each."""
    grounding = example("grounding")
    grounding.main(["--model", str(model_folder)])
    printed = capsys.readouterr().out
    lm = load(model_folder)
    asked = grounding.build(lm, grounding.read_answers())
    num_again = sum(one.answer.stop - one.answer.start for one in asked)
    num_ranges = len(set(grounding.layers_of(lm).values()))
    texts = [one.text for one in asked]
    lines = (
        "plain calls, output_attentions=True",
        "backprompt: the texts, once",
        "backprompt: tokens of answers again",
    )
    found = [re.search(rf"{line} +([\d,]+)", printed) for line in lines]
    assert [int(match[1].replace(",", "")) for match in found if match is not None] == [
        20 * sum(len(text.tokens) for text in texts),
        num_distinct(texts),
        num_ranges * num_again,
    ]
    gap = re.search(r"plain call: (\S+)\.$", printed)
    assert gap is not None
    assert float(gap[1]) <= ATOL[torch.float32]
    assert max(map(len, printed.splitlines())) <= 100


def test_grounding_data(example: Callable[[str], ModuleType]) -> None:
    """As many answers with support as without, and nothing in their form that tells them apart."""
    answers = example("grounding").read_answers()
    assert len(answers) == 80
    assert len({answer.document for answer in answers}) == len({answer.question for answer in answers}) == 40
    assert len({answer.string for answer in answers}) == 80
    for supported, unsupported in zip(answers[::2], answers[1::2], strict=True):
        assert (supported.is_supported, unsupported.is_supported) == (True, False)
        assert supported.document_idx == unsupported.document_idx
        assert 30 <= len(supported.document.split()) <= 80
        assert abs(len(supported.string.split()) - len(unsupported.string.split())) <= 4
    assert all(answer.string.endswith(".") and answer.question.endswith("?") for answer in answers)

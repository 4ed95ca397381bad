"""The command line's ways to name prompts and completions: templates, conversations, lists, encodings, cut strings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprompt
from backprompt import LM, chat, load
from backprompt.classify import predict, predict_proba
from backprompt.cli import main
from backprompt.cli.prompts import split_at_common_beginnings
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REVIEWS = ["dull", "great, really", "long"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("gpt2").save_pretrained(folder)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(model) -> LM:
    return load(model, device="cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reviews.csv").write_text("id,review\n" + "".join(f'{idx},"{text}"\n' for idx, text in enumerate(REVIEWS)))


@pytest.fixture
def run(capsys) -> Callable:
    def run_command(*arguments: object):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err.replace("\r", "\n")

    return run_command


@pytest.fixture
def score(run, model) -> Callable:
    def run_score(*arguments: object):
        code, printed, said = run("score", "reviews.csv", "--model", model, "--device", "cpu", *arguments)
        return code, [json.loads(line) for line in printed.splitlines()], said

    return run_score


def probabilities(rows: list, completions: list[str]) -> list[list[float]]:
    return [[row["probabilities"][completion] for completion in completions] for row in rows]


def test_a_template_over_columns_and_completions_in_a_list(score, lm):
    code, rows, _ = score("--template", r"Review: {review} ({id}) {{}}\nSentiment:", "--completions", "bad , good")
    prompts = [f"Review: {review} ({idx}) {{}}\nSentiment:" for idx, review in enumerate(REVIEWS)]
    assert code == 0
    for found, expected in zip(
        probabilities(rows, ["bad", "good"]), predict_proba(prompts, ["bad", "good"], lm).tolist(), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--template", "{revew}"],
            "line 2 of reviews.csv has no 'revew', which --template names. Did you mean 'review'?",
        ),
        (["--template", "{review"], "expected '}' before end of string"),
        (["--template", "{}"], "names of fields in braces"),
        (["--template", "{review:>3}"], "names of fields in braces"),
        (["--template", "review"], "names of fields in braces"),
        (["--template", "{review}", "--column", "review"], "not allowed with"),
        (["--column", "review", "--system", "Be kind."], "give --chat, too"),
        (["--column", "review", "--encoding", "base64"], "base64 is not an encoding of text"),
        (["--column", "review", "--encoding", "utf-16"], "reviews.csv is not utf-16"),
        (["--column", "review", "--search", "best-first", "--top", "1"], "leave --top and --no-normalize out"),
        (["--colum", "review"], "unrecognized arguments: --colum review. Did you mean '--column'?"),
        (["--column", "review", "--delimiter", ";;"], "';;' is not a character that separates values"),
        (["--input-format", "jsonl", "--delimiter", ";"], "--delimiter is for CSV"),
        (["--column", "review", "--joins", "exakt"], "Did you mean 'exact'?"),
    ],
)
def test_what_is_refused_says_what_to_do(score, monkeypatch, arguments, problem):
    monkeypatch.setattr("backprompt.load", None)
    code, rows, said = score("--completions", "bad,good", *arguments)
    assert (code, rows) == (2, [])
    assert problem in said


def test_a_file_of_completions_that_is_missing_is_no_list(score, monkeypatch):
    monkeypatch.setattr("backprompt.load", None)
    code, rows, said = score("--column", "review", "--completions", "labels,v2.txt")
    assert (code, rows) == (2, [])
    assert "--completions labels,v2.txt: no such file" in said


@pytest.mark.parametrize(
    ("before", "now", "problem"),
    [
        (["--regex", "[a-z]+"], [], 'another --regex: "[a-z]+", not null'),
        (["--regex", "[a-z]+"], ["--regex", "[0-9]+"], 'another --regex: "[a-z]+", not "[0-9]+"'),
        ([], ["--json-schema", "schema.json"], "another --json-schema: null, not"),
    ],
)
def test_an_output_is_gone_on_with_by_the_same_constraint(run, model, before, now, problem):
    pytest.importorskip("llguidance")
    Path("schema.json").write_text('{"type": "integer"}')
    Path("prompts.jsonl").write_text(f'"A film"\n{json.dumps("long " * 500)}\n')
    command = ["generate", "prompts.jsonl", "--model", model, "--max-new-tokens", 2, "-o", "out.jsonl", "--slice", 1]
    assert run(*command, *before)[0] == 2  # the last one is too long
    written = Path("out.jsonl").read_text()
    assert written.count("\n") == 1
    code, _, said = run(*command, *now, "--resume")
    assert code == 2
    assert problem in said
    assert Path("out.jsonl").read_text() == written


def test_blanks_at_line_ends_of_completions_are_left_out_and_said(score):
    Path("labels.txt").write_text("bad  \n good\nso so\t\n")
    code, rows, said = score("--column", "review", "--completions", "labels.txt")
    assert code == 0
    assert set(rows[0]["probabilities"]) == {"bad", " good", "so so"}
    assert "labels.txt: blanks at the ends of 2 lines are left out" in said


def test_conversations(score, run, model, lm):
    code, rows, _ = score("--column", "review", "--completions", "bad,good", "--chat", "--system", "Be kind.")
    system = {"role": "system", "content": "Be kind."}
    prompts = [chat(lm, [system, {"role": "user", "content": review}]) for review in REVIEWS]
    assert code == 0
    assert prompts[0].string.endswith("assistant:")
    for found, expected in zip(
        probabilities(rows, ["bad", "good"]), predict_proba(prompts, ["bad", "good"], lm).tolist(), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-6)
    code, _, said = run("draw", "reviews.csv", "--column", "review", "--chat", "-o", "tree.svg")
    assert code == 2
    assert "--chat uses the chat template of a model: add --model NAME" in said


def test_best_first_search_writes_the_prediction_alone(score, lm):
    completions = [f"{one} {two}" for one in ("a", "the") for two in ("cat", "dog", "mat")]
    code, rows, _ = score("--column", "review", "--completions", ",".join(completions), "--search", "best-first")
    assert code == 0
    assert [row.keys() - {"id", "review"} for row in rows] == [{"prediction"}] * len(REVIEWS)
    assert [row["prediction"] for row in rows] == predict(REVIEWS, completions, lm)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "utf-8"])
def test_encodings(score, encoding):
    text = 'id,review\n0,"sch\u00f6n\n genug"\n'
    Path("reviews.csv").write_bytes(text.encode(encoding))
    Path("labels.txt").write_bytes("gut\nb\u00f6se\n".encode(encoding))
    code, rows, _ = score("--column", "review", "--completions", "labels.txt", "--encoding", encoding)
    assert code == 0
    assert [row["review"] for row in rows] == ["sch\u00f6n\n genug"]
    assert set(rows[0]["probabilities"]) == {"gut", "b\u00f6se"}


@pytest.mark.parametrize("arguments", [[], ["store"]])
def test_a_call_with_nothing_gets_the_help(run, arguments):
    code, printed, said = run(*arguments)
    assert (code, printed) == (2, "")
    assert said.startswith("usage: backprompt")
    assert "commands:" in said


def test_a_command_that_is_misspelt(run):
    assert "Did you mean 'score'?" in run("scroe")[2]


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_reports_count_lines_from_1(run, model, more):
    options = ["reviews.csv", "--column", "review", "--model", model, "--device", "cpu"]
    with_completions = [*options, "--completions", "bad,good"]
    for arguments in (["verify", *options], ["explain", *options], ["verify", *with_completions]):
        code, printed, _ = run(*arguments, *more)
        assert code == 0
        assert "texts[" not in printed
    for arguments in (options, with_completions):
        assert "line 4, segment" in run("verify", *arguments)[1]


@pytest.mark.parametrize(
    ("completions", "parts"),
    [([], "line 5 parts from line 2"), (["--completions", "c,d"], "line 5 with 'c' parts from line 2 with 'c'")],
)
def test_explain_says_which_lines_part(run, model, completions, parts):
    Path("prompts.csv").write_text("prompt\na b\na b c\n\na x\n")
    arguments = ["explain", "prompts.csv", "--model", model, "--device", "cpu", *completions]
    assert f"in common: {parts} at token" in run(*arguments)[1].replace("\n", " ")
    assert f"in common: {parts} at token" in " ".join(json.loads(run(*arguments, "--json")[1])["sentences"])


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("auto", ["a b", "a c", "a b", "a  c"]),
        ("space", ["a b", "a  c", "a  b", "a   c"]),
        ("nothing", ["ab", "a c", "a b", "a  c"]),
    ],
)
@pytest.mark.parametrize("has_model", [False, True])
def test_completions_of_reports_stand_where_scores_have_them(run, model, monkeypatch, end, expected, has_model):
    drawn, draw = [], backprompt.draw

    def recorded(texts, **options):
        drawn.extend(text.string for text in texts)
        return draw(texts, **options)

    monkeypatch.setattr("backprompt.draw", recorded)
    Path("prompts.jsonl").write_text('"a"\n"a "\n')
    Path("labels.json").write_text('["b", " c"]')
    of_model = ["--model", model, "--device", "cpu"] if has_model else []
    arguments = ["--completions", "labels.json", "--end-of-prompt", end, "-o", "tree.gv", *of_model]
    assert run("draw", "prompts.jsonl", *arguments)[0] == 0
    assert drawn == expected


def test_no_space_follows_a_special_token(run, model, monkeypatch):
    drawn = []
    monkeypatch.setattr("backprompt.draw", lambda texts, **options: drawn.extend(texts))
    Path("prompts.jsonl").write_text('"a<|endoftext|>"\n')
    run("draw", "prompts.jsonl", "--completions", "b,c", "-o", "tree.gv", "--model", model, "--device", "cpu")
    assert [text.string for text in drawn] == ["a<|endoftext|>b", "a<|endoftext|>c"]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_another_delimiter(score, run, model, delimiter):
    Path("reviews.csv").write_text(f"id{delimiter}review\n0{delimiter}dull\n1{delimiter}great, really\n")
    Path("commas.csv").write_text(f"id{delimiter}review\n1{delimiter}great, really\n")
    hint = f"The file seems to be separated by {delimiter!r}: --delimiter {delimiter!r}."
    for arguments in (["--column", "review"], ["--template", "{review}"], []):
        assert hint in score("--completions", "bad,good", *arguments)[2]
    values = run("score", "commas.csv", "--completions", "bad,good", "--model", model)[2]
    assert f"line 2 of commas.csv has 2 values for the 1 column of the header. {hint}" in values
    code, rows, _ = score("--completions", "bad,good", "--column", "review", "--delimiter", repr(delimiter)[1:-1])
    assert code == 0
    assert [(row["id"], row["review"]) for row in rows] == [("0", "dull"), ("1", "great, really")]


def test_no_hint_where_a_column_has_such_a_name(score):
    Path("reviews.csv").write_text("a;b\n \n")
    assert "separated by" not in score("--completions", "bad,good", "--column", "a;b")[2]


def test_a_store_that_stores_nothing_says_why(score, run):
    for said in (
        score("--column", "review", "--completions", "bad,good", "--store", "prompts.bp")[2],
        run("store", "stat", "prompts.bp")[2],
    ):
        assert "prompts.bp has no entries: runs of fewer than 16 new tokens are not stored" in said
    template = "One word about this review, and no more than this one word: {review}"
    assert "no entries" not in score("--template", template, "--completions", "bad,good", "--store", "prompts.bp")[2]
    assert "no entries" not in run("store", "stat", "prompts.bp")[2]


def test_drawn_strings_are_cut_where_they_part(run):
    pytest.importorskip("pygraphviz")
    Path("prompts.jsonl").write_text(
        "".join(json.dumps(f"Review: a {word}") + "\n" for word in ("cat", "car", "cat ran"))
    )
    assert run("draw", "prompts.jsonl", "-o", "tree.gv")[0] == 0
    start = backprompt.Text("Review: a")
    texts = [start + " cat", start + " car", start + " cat" + " ran"]
    assert Path("tree.gv").read_text() == backprompt.draw(texts).source


def test_cut_strings_of_an_example():
    assert split_at_common_beginnings(["a b c", "a b d", "x", "a b"]) == [
        ("a b", " c"),
        ("a b", " d"),
        ("x",),
        ("a b",),
    ]


@given(st.lists(st.lists(st.sampled_from(["a", " b", " a", "\n", "!"]), max_size=6).map("".join), max_size=8))
def test_cut_strings_share_their_beginnings(strings):
    """Parts give back the string, and two strings have the same parts up to where they differ in words."""
    found = split_at_common_beginnings(strings)
    assert ["".join(parts) for parts in found] == strings
    assert all(all(parts) for parts in found)
    for left, right in ((left, right) for left in found for right in found):
        shared = next((idx for idx, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
        if shared is not None:  # the parts behind begin with other words
            one, other = left[shared], right[shared]
            assert split_at_common_beginnings([one, other]) == [(one,), (other,)]

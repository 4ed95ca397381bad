"""The command line: rows in and out, going on after an interruption, exit codes, errors in one line.

`run(...)` is `main([...])` in this process; the results are compared with the library's own calls on the same model.
"""

import contextlib
import csv
import fcntl
import io
import json
import logging
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import backprompt
from backprompt import LM, Text, load
from backprompt.classify import predict_proba
from backprompt.cli import main
from backprompt.cli.arguments import read_completions
from backprompt.cli.input import Input
from backprompt.cli.output import Output
from backprompt.cli.rows import Row
from backprompt.cli.score import AGGREGATES
from backprompt.cli.wording import in_options
from said import own_lines
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

LABELS = ["good", "bad", "so so"]
PROMPTS = [f"Review: the film was {word}.\nLabel:" for word in ("great", "dull", "long", "loud", "fine")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("gpt2").save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lm(model) -> LM:
    return load(model, device="cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with prompts and labels in it."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("prompts.jsonl", [{"id": idx, "prompt": prompt} for idx, prompt in enumerate(PROMPTS)])
    Path("labels.txt").write_text("\n".join(LABELS) + "\n")
    return tmp_path


@pytest.fixture
def run(capsys) -> Callable:
    """Runs a command; returns its exit code, and what it printed and said."""

    def run_command(*arguments: object):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


@pytest.fixture
def score(run, model) -> Callable:
    def run_score(*arguments: object):
        return run("score", "--completions", "labels.txt", "--model", model, "--device", "cpu", *arguments)

    return run_score


@pytest.fixture
def generate(run, model) -> Callable:
    def run_generate(*arguments: object):
        return run("generate", "--max-new-tokens", 4, "--model", model, "--device", "cpu", *arguments)

    return run_generate


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Make loading a model an error: the tested message must come before."""

    def refuse(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("backprompt.load", refuse)


def write_jsonl(path: str, values: list) -> None:
    Path(path).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def read_jsonl(path: str) -> list:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def read_csv(text: str) -> list:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def rounded(written: str) -> str:
    """With few digits: passes of other tokens round otherwise."""
    return re.sub(r"-?\d+\.\d+(e-\d+)?", lambda number: f"{float(number[0]):.3f}", written)


def only_line(said: str) -> str:
    (line,) = said.splitlines()
    return line


# score


def test_scores_are_those_of_predict_proba(score, lm):
    code, printed, said = score("prompts.jsonl")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert (code, said) == (0, "")
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    for row, expected in zip(rows, predict_proba(PROMPTS, LABELS, lm), strict=True):
        assert [row["probabilities"][label] for label in LABELS] == pytest.approx(expected.tolist(), abs=1e-6)
        assert row["prediction"] == LABELS[expected.argmax()] == next(iter(row["probabilities"]))
        assert row["probability"] == max(row["probabilities"].values())


def test_a_lone_surrogate_among_completions_is_bad_input(score):
    Path("labels.json").write_text('["good", "bad\\ud800"]')
    code, printed, said = score("prompts.jsonl", "--completions", "labels.json")
    assert (code, printed) == (2, "")
    assert "completion 2 of --completions" in said
    assert "lone surrogate at character 3" in said


def test_scoring_options(score, lm):
    options = ["--prior", "0.5,0.25,0.25", "--aggregate", "sum", "--discount-completions", "-0.5"]
    code, printed, _ = score(
        "prompts.jsonl", *options, "--neutral-prompt", "N/A", "--top", "2", "--end-of-prompt", "nothing"
    )
    expected = predict_proba(
        PROMPTS,
        LABELS,
        lm,
        prior=[0.5, 0.25, 0.25],
        aggregate="sum",
        discount_completions=-0.5,
        neutral_prompt="N/A",
        end_of_prompt="",
    )
    assert code == 0
    for line, probabilities in zip(printed.splitlines(), expected, strict=True):
        found = json.loads(line)["probabilities"]
        best = sorted(zip(probabilities, LABELS, strict=True), reverse=True)[:2]
        assert list(found) == [label for _, label in best]
        assert list(found.values()) == pytest.approx([float(p) for p, _ in best], abs=1e-6)


def test_a_prior_from_a_file_and_one_completion(score, lm):
    Path("prior.txt").write_text("0.5\n0.25\n0.25\n")
    assert score("prompts.jsonl", "--prior", "prior.txt") == score("prompts.jsonl", "--prior", "0.5,0.25,0.25")
    Path("labels.txt").write_text("good\n")
    _, printed, _ = score("prompts.jsonl", "--no-normalize")
    found = [json.loads(line)["probability"] for line in printed.splitlines()]
    assert found == pytest.approx(predict_proba(PROMPTS, ["good"], lm, normalize=False)[:, 0].tolist(), abs=1e-6)


@pytest.mark.usefixtures("folder")
def test_slices_share_what_prompts_have_in_common(model, monkeypatch, run, lm):
    """The tokens forwarded are those of one call over all prompts, however they are cut."""
    lms = []

    def remembered(*arguments, **options):
        lms.append(load(*arguments, **options))
        return lms[-1]

    monkeypatch.setattr("backprompt.load", remembered)
    run("score", "prompts.jsonl", "--completions", "labels.txt", "--model", model, "--slice", "2", "--device", "cpu")
    before = lm.stats
    lm.clear()
    predict_proba(PROMPTS, LABELS, lm)
    assert lms[0].stats.tokens_computed == (lm.stats - before).tokens_computed > 0


# generate


def test_continuations_are_those_of_generate(generate, lm):
    code, printed, said = generate("prompts.jsonl", "--slice", "2")
    rows = [json.loads(line) for line in printed.splitlines()]
    expected = backprompt.generate([Text(prompt, lm) for prompt in PROMPTS], max_new_tokens=4)
    assert (code, said) == (0, "")
    assert [row["completion"] for row in rows] == [text.completion for text in expected]
    assert {row["finish_reason"] for row in rows} == {"length"}
    for row, text in zip(rows, expected, strict=True):
        assert row["num_new_tokens"] == len(text.completion_tokens) == 4
        assert row["logprob"] == pytest.approx(float(text.completion_logprobs.sum()), abs=1e-5)


def test_samples_do_not_depend_on_slices_or_on_where_it_was_interrupted(generate, lm):
    write_jsonl("prompts.jsonl", [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2]])  # one is there twice
    options = ["--n", "3", "--temperature", "0.9", "--seed", "7"]
    _, whole, _ = generate("prompts.jsonl", *options)
    _, cut, _ = generate("prompts.jsonl", *options, "--slice", "1")
    assert rounded(cut) == rounded(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2] * 4
    expected = backprompt.generate(Text(PROMPTS[1], lm), max_new_tokens=4, n=3, temperature=0.9, seed=7)
    assert [row["completion"] for row in rows[3:6]] == [text.completion for text in expected]

    lines = whole.splitlines(keepends=True)
    Path("out.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # all of one prompt, and part of the next
    assert generate("prompts.jsonl", *options, "-o", "out.jsonl", "--resume")[0] == 0
    assert rounded(Path("out.jsonl").read_text()) == rounded(whole)


def test_stop_strings_and_other_options(generate, lm):
    (first,) = backprompt.generate([Text(PROMPTS[0], lm)], max_new_tokens=1)
    write_jsonl("prompts.jsonl", [PROMPTS[0]])
    _, printed, _ = generate("prompts.jsonl", "--stop", "never this", "--stop", first.completion)
    row = json.loads(printed)
    assert {name: row[name] for name in ("completion", "finish_reason", "num_new_tokens", "logprob")} == {
        "completion": "",
        "finish_reason": "stop",
        "num_new_tokens": 0,
        "logprob": 0.0,
    }
    _, printed, _ = generate("prompts.jsonl", "--stop", first.completion, "--include-stop")
    assert json.loads(printed)["completion"] == first.completion
    _, printed, _ = generate("prompts.jsonl", "--option", f"suppress_tokens=[{first.completion_tokens[0]}]")
    expected = Text(PROMPTS[0], lm).generate(max_new_tokens=4, suppress_tokens=list(first.completion_tokens))
    assert json.loads(printed)["completion"] == expected.completion
    assert first.completion not in expected.completion


def test_constraints(generate, lm):
    write_jsonl("prompts.jsonl", [PROMPTS[0]])
    _, printed, _ = generate("prompts.jsonl", "--regex", "[0-9]{2}")
    expected = Text(PROMPTS[0], lm).generate(max_new_tokens=4, constraint=backprompt.Regex("[0-9]{2}"))
    row = json.loads(printed)
    assert (row["completion"], row["finish_reason"]) == (expected.completion, expected.finish_reason)
    assert len(row["completion"]) == 2
    Path("schema.json").write_text('{"enum": [1, 2]}')
    _, printed, _ = generate("prompts.jsonl", "--json-schema", "schema.json")
    assert json.loads(printed)["completion"] in ("1", "2")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "none.json"], "none.json cannot be read as JSON"),
        (["--json-schema", "labels.txt"], "labels.txt cannot be read as JSON"),
        (["--regex", "a", "--json-schema", "none.json"], "none.json"),
        (["--option", "constraint=1"], "--regex or --json-schema"),
    ],
)
def test_constraints_that_are_refused(generate, options, message):
    code, _, said = generate("prompts.jsonl", *options)
    assert code == 2
    assert message in said


@pytest.mark.usefixtures("no_model")
def test_more_than_one_greedy_continuation_is_refused(generate):
    code, _, said = generate("prompts.jsonl", "--n", "2")
    assert code == 2
    assert "--do-sample" in only_line(said)


# Rows


def test_csv_in_and_out(score, lm):
    prompts = ['Said: "yes,\nno"', "plain", "Œuvre \r, 東京"]
    with open("in.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(prompts))
    assert score("in.csv", "--column", "text", "-o", "out.csv")[0] == 0
    with open("out.csv", newline="", encoding="utf-8") as file:
        rows = read_csv(file.read())
    assert [(row["id"], row["text"]) for row in rows] == [(str(idx), prompt) for idx, prompt in enumerate(prompts)]
    assert [row["prediction"] for row in rows] == backprompt.classify.predict(prompts, LABELS, lm)
    for row in rows:
        assert json.loads(row["probabilities"])[row["prediction"]] == float(row["probability"])


def test_what_passes_through_is_what_the_input_has_to_the_letter(score):
    lines = [
        r'{"id":12345678901234567890, "prompt" :"The cat","x": [1.10, 3.14159265358979323846, 1e5, -0.0]}',
        r'{ "prompt": "\u0054he c\u00e4t \ud83d\ude00", "y": {"nested": {"nested": null}}, "é": "日本"}  ',
        '{"prompt": "The dog",\t"z": 1e-400}\r',
    ]
    Path("in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert score("in.jsonl", "-o", "out.jsonl")[0] == 0
    written = Path("out.jsonl").read_text(encoding="utf-8")
    for line, found in zip(lines, written.splitlines(), strict=True):
        assert found.startswith(f'{{{line.strip()[1:-1].strip()}, "prediction": ')
        assert list(json.loads(found)) == [*json.loads(line), "prediction", "probability", "probabilities"]
    Path("out.jsonl").write_text(written[: written.index('"The dog"') + 3], encoding="utf-8")
    assert score("in.jsonl", "-o", "out.jsonl", "--resume")[0] == 0
    assert rounded(Path("out.jsonl").read_text(encoding="utf-8")) == rounded(written)


def test_json_on_a_terminal_has_no_control_characters_and_means_the_same(score):
    row = {"prompt": "a\x1b]0;title\x07", "\x7f": "\x9b31m\u202e\ufeff\U000e0041", "kept": "\u200d é 日本 \xa0 😀"}
    Path("in.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    _, printed, _ = score("in.jsonl")
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ufeff\U000e0041]", printed) is None
    assert {name: json.loads(printed)[name] for name in row} == row
    assert row["kept"] in printed


MARK = "\ufeff"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n\r\n"])
@pytest.mark.parametrize("mark", ["", MARK], ids=["", "mark"])
def test_marks_ends_of_lines_and_empty_lines_do_not_matter(mark, end):
    lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    for last in ("", end):
        Path("in.jsonl").write_bytes((mark + end.join(lines) + last).encode())
        Path("in.csv").write_bytes((mark + end.join(["prompt", "a", '"b\r\nc"']) + last).encode())
        Path("labels.txt").write_bytes((mark + end.join(LABELS) + last).encode())
        assert [row.parts for row in Input("in.jsonl", "jsonl").rows()] == [(prompt,) for prompt in PROMPTS]
        assert [row.parts for row in Input("in.csv", "csv").rows()] == [("a",), ("b\r\nc",)]
        assert read_completions("labels.txt") == LABELS


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "labels.txt"])
def test_other_encodings_are_named(score, name, encoding):
    content = {"in.jsonl": '{"prompt": "ä"}\n', "in.csv": "prompt\nä\n", "labels.txt": "gut\nböse\n"}[name]
    Path(name).write_bytes(content.encode(encoding))
    code, _, said = score("prompts.jsonl" if name == "labels.txt" else name)
    assert code == 2
    where = name if name == "labels.txt" else f"line 1 of {name}"
    assert only_line(said).startswith(f"backprompt: error: {where} ")
    assert "UTF-16" in said


def test_formulas_are_escaped_on_request(score):
    cells = ["=1+1", "+a", "-a", "@a", "\ta", "\uff1da", "-1.5", "+2e3", "a=", "'=a"]
    with open("in.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "x"], *([f"The cat {idx}", cell] for idx, cell in enumerate(cells))])
    Path("labels.txt").write_text("=good\nbad\n")
    assert score("in.csv", "-o", "plain.csv")[0] == 0
    assert [row["x"] for row in read_csv(Path("plain.csv").read_bytes().decode())] == cells
    assert score("in.csv", "-o", "out.csv", "--escape-formulas")[0] == 0
    written = Path("out.csv").read_bytes()
    rows = read_csv(written.decode())
    assert [row["x"] for row in rows] == [*(f"'{cell}" for cell in cells[:6]), *cells[6:]]
    assert {row["prediction"] for row in rows} <= {"'=good", "bad"}
    Path("out.csv").write_bytes(written[: written.index(b"The cat 5") + 16])
    code, _, said = score("in.csv", "-o", "out.csv", "--resume")
    assert (code, "so it cannot be continued" in only_line(said)) == (2, True)
    assert score("in.csv", "-o", "out.csv", "--escape-formulas", "--resume")[0] == 0
    assert rounded(Path("out.csv").read_bytes().decode()) == rounded(written.decode())


def test_a_column_cannot_be_a_formula(score):
    Path("in.csv").write_text("prompt,=x\na,b\n")
    code, _, said = score("in.csv", "-o", "out.csv", "--escape-formulas")
    assert (code, "has a column '=x'" in only_line(said)) == (2, True)
    assert "is for CSV" in score("in.csv", "--escape-formulas")[2]


def test_strings_and_lists_of_parts_are_prompts(score, lm):
    write_jsonl("in.jsonl", ["The cat", {"parts": ["The ", "cat"]}, {"prompts": ["Th", "e cat"], "x": None}])
    _, printed, _ = score("in.jsonl")
    rows = [json.loads(line) for line in printed.splitlines()]
    assert rows[0]["prompt"] == "The cat"
    assert rows[2]["x"] is None
    assert rows[0]["probabilities"] == pytest.approx(rows[1]["probabilities"], abs=1e-6)
    assert rows[1]["probabilities"] == pytest.approx(rows[2]["probabilities"], abs=1e-6)


def test_parts_are_encoded_apart_where_joins_are_split(generate, lm, model):
    parts = ["The c", "at s", "at"]
    write_jsonl("in.jsonl", [{"parts": parts}])
    split = load(model, device="cpu", joins="split")
    text = Text("", split).join(parts)
    assert text.tokens != Text("".join(parts), split).tokens
    _, printed, _ = generate("in.jsonl", "--joins", "split")
    assert json.loads(printed)["completion"] == text.generate(max_new_tokens=4).completion
    code, _, said = generate("in.jsonl", "--joins", "error")
    assert code == 2
    assert only_line(said).startswith("backprompt: error: line 1 of in.jsonl: ")


def test_pipes(score, monkeypatch):
    _, expected, _ = score("prompts.jsonl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path("prompts.jsonl").read_bytes())))
    assert score("-") == (0, expected, "")


def test_a_store_serves_the_next_process(score, monkeypatch):
    lms = []

    def remembered(*arguments, **options):
        lms.append(load(*arguments, **options))
        return lms[-1]

    monkeypatch.setattr("backprompt.load", remembered)
    first, second = (score("prompts.jsonl", "--store", "prompts.bp", "--memory", "1 MB")[1] for _ in range(2))
    assert rounded(first) == rounded(second)
    assert lms[0].stats.tokens_loaded == 0 < lms[1].stats.tokens_loaded
    assert lms[1].stats.tokens_computed < lms[0].stats.tokens_computed


@settings(max_examples=25)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(min_size=1, alphabet=st.characters(codec="utf-8")), st.text() | st.integers(), max_size=3
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_what_was_cut_off_anywhere_is_gone_on_with(tmp_path_factory, format, rows, data):
    """Any beginning of an output, in bytes, gives the whole output once it was gone on with."""
    names = list(rows[0]) if format == "csv" else []
    given_rows = [
        Row(f"row {idx}", ("p",), {name: fields.get(name, "") for name in names} if names else fields)
        for idx, fields in enumerate(rows)
    ]
    given_rows = [Row(r.where, r.parts, {k: clean(v) for k, v in r.fields.items()}) for r in given_rows]
    path = tmp_path_factory.mktemp("rows") / f"out.{format}"

    def write(first: int, *, output: Output) -> None:
        output.open()
        output.cut_off()
        for row in given_rows[first:]:
            output.write(row, [{"result\n": 'a "quoted"\r\n, one', "n": 0}, {"result\n": None, "n": 1.5}])
        output.close()

    def new_output() -> Output:
        return Output(str(path), format, ["result\n", "n"], rows_per_prompt=2)

    write(0, output=new_output())
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    output = new_output()
    output.claim()
    num_done, _ = output.resume(iter(given_rows), lambda fields: None)
    write(num_done, output=output)
    assert path.read_bytes() == whole


def clean(value):
    """Without halves of surrogate pairs and NUL, which the input cannot hold."""
    return value.encode(errors="ignore").decode().replace("\0", "") if isinstance(value, str) else value


# Going on


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_an_interruption_loses_only_what_was_not_written(score, monkeypatch, name, lm):
    score("prompts.jsonl", "-o", f"whole.{name}")
    slices = []

    def interrupted(prompts, *arguments, **options):
        slices.append(len(prompts))
        if len(slices) == 2:
            raise KeyboardInterrupt
        return predict_proba(prompts, *arguments, **options)

    monkeypatch.setattr("backprompt.classify.predict_proba", interrupted)
    code, _, said = score("prompts.jsonl", "-o", name, "--slice", "2")
    assert code == 130
    assert only_line(said) == "backprompt: interrupted; go on with --resume"
    with open(name, "a") as file:
        file.write('{"id": 2, "pro' if name.endswith("jsonl") else '2,"Review: the fi')  # half a row
    assert score("prompts.jsonl", "-o", name, "--slice", "2", "--resume")[0] == 0
    assert rounded(Path(name).read_text()) == rounded(Path(f"whole.{name}").read_text())
    assert slices == [2, 2, 2, 1]


@pytest.mark.usefixtures("no_model")
def test_what_is_complete_needs_no_model(score, lm, monkeypatch):
    rows = [{"id": idx, "prompt": prompt} for idx, prompt in enumerate(PROMPTS)]
    probabilities = {"probabilities": dict.fromkeys(LABELS, 1 / 3)}
    write_jsonl("out.jsonl", [{**row, "prediction": "good", "probability": 1 / 3, **probabilities} for row in rows])
    before = Path("out.jsonl").read_bytes()
    said = "backprompt: 5 rows are there, nothing to do\n"
    assert score("prompts.jsonl", "-o", "out.jsonl", "--resume") == (0, "", said)
    assert Path("out.jsonl").read_bytes() == before


def test_resume_begins_where_there_is_nothing(score):
    assert score("prompts.jsonl", "-o", "out.jsonl", "--resume")[0] == 0
    assert len(read_jsonl("out.jsonl")) == len(PROMPTS)


@pytest.mark.usefixtures("folder")
def test_a_killed_process_leaves_a_beginning(model, score):
    """SIGKILL comes as soon as two of five rows are written, with the input still open."""
    command = ["-m", "backprompt", "score", "-", "--completions", "labels.txt", "--model", model]
    command += ["--device", "cpu", "-o", "out.jsonl", "--slice", "1"]
    with in_a_process(*command, stdin=subprocess.PIPE) as process:
        lines = Path("prompts.jsonl").read_bytes().splitlines(keepends=True)
        process.stdin.write(b"".join(lines[:2]))
        process.stdin.flush()
        while process.poll() is None and len(written("out.jsonl")) < 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        said = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL
    assert own_lines(said) == []  # no bar, no message of anybody's: standard error is no terminal
    assert [row["id"] for row in read_jsonl("out.jsonl")] == [0, 1]
    score("prompts.jsonl", "-o", "whole.jsonl")
    assert score("prompts.jsonl", "-o", "out.jsonl", "--resume")[0] == 0
    found, expected = read_jsonl("out.jsonl"), read_jsonl("whole.jsonl")
    assert [row["prediction"] for row in found] == [row["prediction"] for row in expected]
    assert [row["id"] for row in found] == list(range(len(PROMPTS)))


def in_a_process(*arguments: object, **options) -> subprocess.Popen:
    """A process of this Python with this package, whose standard error can be read; it takes signals as by default."""

    def take_signals() -> None:  # a job in the background has them ignored
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    root = Path(backprompt.__file__).parent.parent
    before = options.pop("before", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, [before]), str(root)])}
    command = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, preexec_fn=take_signals, **pipes, **options)


def test_an_interrupt_while_torch_is_imported(model):
    """Ends the process by the signal, as shells want it to; nothing but a line is said."""
    Path("slow").mkdir()
    Path("slow/torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    arguments = ["prompts.jsonl", "--completions", "labels.txt", "--model", model, "-o", "out.jsonl"]
    with in_a_process("-m", "backprompt", "score", *arguments, before="slow") as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
    assert said == "backprompt: interrupted; go on with --resume\n"
    assert process.returncode == -signal.SIGINT


SIGNALLED = """
import gc, json, os, signal, sys, time
import backprompt, backprompt.cli
backprompt.LM  # torch, imported once for all
gc.freeze()  # else a child may first copy all objects of torch, to find that none is garbage
for delay, number, *sys.argv[1:] in json.loads(sys.argv[1]):
    begun, begins = os.pipe()
    process = os.fork()
    if not process:
        os.write(begins, b"!")
        os._exit(backprompt.cli.main())
    os.read(begun, 1)
    time.sleep(delay)
    os.kill(process, number)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


INTERRUPTED_DESTRUCTOR = re.compile(
    r"Exception ignored in: <function \S*__del__ .*\n(?:.*\n){1,9}?KeyboardInterrupt: \n"
)
"""Python's words where a signal comes within the destructor of an object: it goes on there, uninterrupted."""


def test_whenever_a_signal_comes_the_rows_are_those_of_an_uninterrupted_run(generate, model):
    """Each output gets three signals at random times, and is gone on with each time."""
    prompts = [{"id": idx, "prompt": PROMPTS[idx % 5], "x": 1.0} for idx in range(20)]
    write_jsonl("prompts.jsonl", prompts)
    options = ["prompts.jsonl", "--n", 2, "--temperature", 0.9, "--seed", 1, "--slice", 1]
    names = ["0.jsonl", "1.csv", "2.jsonl", "3.csv"]
    draw = random.Random(1)
    runs = []
    for name in names:
        command = ["generate", *options, "--max-new-tokens", 4, "--model", str(model), "--device", "cpu"]
        for number in draw.choices([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGPIPE], k=3):
            runs.append([draw.uniform(0, 0.8), number, *map(str, command), "-o", name, "--resume"])
    with in_a_process("-c", SIGNALLED, json.dumps(runs)) as process:
        printed, said = (given.decode() for given in process.communicate())
    said = INTERRUPTED_DESTRUCTOR.sub("", said)
    assert set(own_lines(said)) <= {
        "backprompt: interrupted",  # before the options were read
        "backprompt: interrupted; go on with --resume",
        f"backprompt: {2 * len(prompts)} rows are there, nothing to do",
    }
    codes = [int(code) for code in printed.split()]
    assert all(code in (0, -run[1]) for code, run in zip(codes, runs, strict=True))
    assert any(codes)
    for name in names:
        assert generate(*options, "-o", name, "--resume")[0] == 0
        whole = f"whole{Path(name).suffix}"
        assert os.path.exists(whole) or generate(*options, "-o", whole)[0] == 0
        assert rounded(Path(name).read_text()) == rounded(Path(whole).read_text())
        assert [path.name for path in Path().glob(f"{name}*")] == [name]


def written(path: str) -> list[bytes]:
    return Path(path).read_bytes().splitlines() if os.path.exists(path) else []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("mode", ["--resume", "--overwrite"])
def test_an_output_that_another_process_writes_to(score, mode):
    Path("out.jsonl").write_text('{"id": 0, "pro')
    with open("out.jsonl", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, said = score("prompts.jsonl", "-o", "out.jsonl", mode)
    assert code == 2
    assert "out.jsonl is being written to by another process" in only_line(said)
    assert Path("out.jsonl").read_text() == '{"id": 0, "pro'


def test_two_processes_that_begin_together(score, monkeypatch):
    """The second one finds an output that was not there when it looked."""

    def load_slowly(*arguments, **options):
        Path("out.jsonl").write_text("of the first one")
        return load(*arguments, **options)

    monkeypatch.setattr("backprompt.load", load_slowly)
    code, _, said = score("prompts.jsonl", "-o", "out.jsonl")
    assert code == 2
    assert "out.jsonl did not exist at the start and exists now: another process writes to it" in only_line(said)
    assert Path("out.jsonl").read_text() == "of the first one"


def test_an_output_is_kept_from_others_while_it_is_written(score, monkeypatch):
    found = []

    def look(*arguments, **options):
        with open("out.jsonl", "ab") as other, contextlib.suppress(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append("not kept")
        return predict_proba(*arguments, **options)

    monkeypatch.setattr("backprompt.classify.predict_proba", look)
    for mode in ([], ["--overwrite"]):
        assert score("prompts.jsonl", "-o", "out.jsonl", *mode)[0] == 0
        assert not found


def test_outputs_that_are_no_files(score):
    Path("link.jsonl").symlink_to("behind.jsonl")
    assert score("prompts.jsonl", "-o", "link.jsonl")[0] == 0
    assert len(read_jsonl("behind.jsonl")) == len(PROMPTS)
    assert score("prompts.jsonl", "-o", os.devnull, "--format", "jsonl") == (0, "", "")
    os.mkfifo("pipe.jsonl")
    rows = []
    reader = threading.Thread(target=lambda: rows.extend(read_jsonl("pipe.jsonl")))
    reader.start()
    assert score("prompts.jsonl", "-o", "pipe.jsonl")[0] == 0
    reader.join()
    assert [row["id"] for row in rows] == list(range(len(PROMPTS)))
    for path in ("pipe.jsonl", os.devnull):
        code, _, said = score("prompts.jsonl", "-o", path, "--format", "jsonl", "--resume")
        assert (code, "--resume continues a file" in only_line(said)) == (2, True)
    assert list(Path().glob("*.options.json*")) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", ["link", "hard link", "standard input", "standard output"])
def test_the_input_is_not_written_to(score, monkeypatch, kind):
    output = {"link": "link.jsonl", "hard link": "hard.jsonl", "standard output": "-"}.get(kind, "prompts.jsonl")
    Path("link.jsonl").symlink_to("prompts.jsonl")
    os.link("prompts.jsonl", "hard.jsonl")
    before = Path("prompts.jsonl").read_bytes()
    with open("prompts.jsonl", "a+") as file, pytest.MonkeyPatch.context() as patch:
        file.seek(0)
        if kind.startswith("standard"):
            patch.setattr(sys, "stdin" if kind.endswith("input") else "stdout", file)
        given = "-" if kind == "standard input" else "prompts.jsonl"
        code, _, said = score(given, "-o", output, *([] if output == "-" else ["--overwrite"]))
    assert code == 2
    assert "is the input. Give the output another name" in only_line(said)
    assert Path("prompts.jsonl").read_bytes() == before


def test_options_of_an_output_that_was_replaced_do_not_matter(generate):
    """A process that was killed between emptying an output and saying how it is written leaves those of before."""
    Path("out.jsonl").write_text("")
    write_jsonl("out.jsonl.options.json", [{"backprompt": {"max_new_tokens": 7}}])
    Path("out.jsonl.options.json.part").write_text('{"backpro')
    assert generate("prompts.jsonl", "-o", "out.jsonl", "--resume")[0] == 0
    assert len(read_jsonl("out.jsonl")) == len(PROMPTS)


@pytest.mark.parametrize("closed", ["stderr", "both"])
def test_a_closed_standard_error_gets_nothing_into_the_output(score, monkeypatch, closed):
    monkeypatch.setattr(sys, "stderr", None)
    if closed == "both":
        monkeypatch.setattr(sys, "stdout", None)
    code, printed, _ = score("prompts.jsonl", "-v")
    assert code == (0 if closed == "stderr" else 2)
    assert all(json.loads(line) for line in printed.splitlines())


def test_who_closes_the_output_is_not_told(model, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        stderr = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stderr)
        arguments = ["score", "prompts.jsonl", "--completions", "labels.txt", "--model", str(model), "--device", "cpu"]
        assert main(arguments) == 141
    assert stderr.getvalue() == ""


# Errors


BAD_LINES = {
    "not json": ("{prompt: 1}", "JSONL has a JSON value a line"),
    "a number": ("17", "is neither a JSON object nor a JSON string, but 17"),
    "no prompt": ('{"text": "a"}', "has no field 'prompt'"),
    "two prompts": ('{"prompt": "a", "parts": ["b"]}', "has both 'prompt' and 'parts'"),
    "a prompt that is no string": ('{"prompt": 5}', "must be a string or a list of strings, and holds 5"),
    "null": ('{"prompt": null}', "must be a string or a list of strings"),
    "a part that is no string": ('{"parts": ["a", 5]}', "and holds 5"),
    "an empty prompt": ('{"prompt": ""}', "is empty"),
    "half a character": ('{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    "the name of a result": ('{"prompt": "a", "prediction": 1}', "has a field 'prediction'"),
    "not a number": ('{"prompt": "a", "x": NaN}', "NaN is not a finite number"),
    "a number that is too large": ('{"prompt": "a", "x": 1e999}', "1e999 is not a finite number"),
    "brackets without end": ("[" * 100_000, "is JSON that cannot be read"),
    "two fields of one name": ('{"prompt": "a", "prompt": "b"}', "an object has two fields called 'prompt'"),
    "two fields within": ('{"prompt": "a", "x": [{"y": 1, "y": 1}]}', "an object has two fields called 'y'"),
    "NUL": ('{"prompt": "a\0"}', "holds NUL bytes"),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("line", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named_before_a_model_is_loaded(score, line, problem):
    with open("prompts.jsonl", "a") as file:
        file.write("\n" + line + "\n")
    code, printed, said = score("prompts.jsonl", "-o", "out.jsonl")
    assert (code, printed) == (2, "")
    assert only_line(said).startswith(f"backprompt: error: line {len(PROMPTS) + 2} of prompts.jsonl")
    assert problem in said
    assert not Path("out.jsonl").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"prompt\na\n\xff\n", "line 3 of in.csv is not UTF-8"),
        (b"prompt\n" + b"a\n" * 9_000 + b"\xff\n", "line 9002 of in.csv is not UTF-8"),
        (b"prompt\na\0\n", "line 2 of in.csv holds NUL bytes"),
        (b"prompt,id\na\n", "line 2 of in.csv has 1 value for the 2 columns"),
        (b"text,id\na,1\n", "line 2 of in.csv has no column 'prompt'"),
        (b"prompt,prompt\na,1\n", "two columns called 'prompt'"),
        (b'prompt\n"a" b\n', "line 2 of in.csv is not CSV"),
        (b"prompt\n", "in.csv has no rows"),
        (b"", "in.csv has no rows"),
    ],
)
def test_bad_csv(score, content, problem):
    Path("in.csv").write_bytes(content)
    code, _, said = score("in.csv")
    assert code == 2
    assert problem in only_line(said)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["missing.jsonl"], "missing.jsonl does not exist"),
        (["."], "is a folder"),
        (["labels.txt"], "may be JSONL or CSV. Say which, by the extension (.jsonl, .csv) or with --input-format"),
        (["prompts.jsonl", "-o", "there.csv"], "exists already. Continue it with --resume"),
        (["prompts.jsonl", "-o", "labels.txt", "--format", "csv", "--overwrite"], "labels.txt is --completions"),
        (["prompts.jsonl", "-o", "prior.txt", "--prior", "prior.txt", "--format", "csv", "--resume"], "is --prior"),
        (["prompts.jsonl", "-o", ".", "--format", "csv"], ". is a folder"),
        (["prompts.jsonl", "--store", "labels.txt"], "--store: [Errno 20] This folder cannot be used for a store"),
        (["prompts.jsonl", "--store", "labels.txt/prompts.bp"], "Not a directory. Name a folder"),
        (["prompts.jsonl", "--store", "x" * 5000], "File name too long. Choose a shorter path"),
        (["prompts.jsonl", "--store", ""], "the path is empty. Name a folder"),
        (["prompts.jsonl", "--store", "."], "it has other content, such as"),
        (["prompts.jsonl", "--discount-completions", "nan"], "nan is not a finite number"),
        (["prompts.jsonl", "-o", "prompts.jsonl", "--overwrite"], "is the input"),
        (["prompts.jsonl", "-o", "nowhere/out.jsonl"], "there is no folder nowhere"),
        (["prompts.jsonl", "--resume"], "name the file with -o FILE"),
        (["prompts.jsonl", "--memory", "lots"], "--memory must be a number of bytes"),
        (["prompts.jsonl", "--device", "abacus"], "--device abacus cannot be used"),
        (["prompts.jsonl", "--device", "hpu"], "--device hpu cannot be used: No module named"),
        (["prompts.jsonl", "--device", "meta"], "--device meta holds no weights"),
        (["prompts.jsonl", "--prior", "0.5,0.5"], "prior has the shape (2,) for 3 completions"),
        (["prompts.jsonl", "--prior", "nowhere.txt"], "--prior nowhere.txt: no such file. Name a file, or give"),
        (["prompts.jsonl", "--prior", "0.5,x"], "--prior 0.5,x: no such file. Name a file, or give a number for each"),
        (["prompts.jsonl", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["prompts.jsonl", "--slice", "0"], "0 is not at least 1"),
    ],
)
def test_bad_arguments(score, arguments, problem):
    Path("there.csv").write_text("")
    Path("prior.txt").write_text("0.5\n0.25\n0.25\n")
    names = ("prompts.jsonl", "labels.txt", "prior.txt", "there.csv")
    before = [Path(name).read_bytes() for name in names]
    code, printed, said = score(*arguments)
    assert (code, printed) == (2, "")
    assert problem in only_line(said)
    assert [Path(name).read_bytes() for name in names] == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"id": 9, "prompt": PROMPTS[0], "prediction": "good"}, "row 1 of out.jsonl is not from line 1"),
        ({"id": 0, "prompt": PROMPTS[0], "completion": "good"}, "row 1 of out.jsonl is not from line 1"),
        ({"id": 0, "prompt": PROMPTS[0], "prediction": "x", "probability": 1, "probabilities": {"x": 1}}, "has other"),
        ({"id": 0, "prompt": PROMPTS[0], "prediction": "good", "probabilities": {"good": 1}}, "has other completions"),
        ({"id": 0, "prompt": PROMPTS[0], "prediction": "x", "probabilities": dict.fromkeys("xyz", 1)}, "has other"),
        ([], "row 1 of out.jsonl cannot be read"),
    ],
)
def test_the_output_of_something_else_is_not_gone_on_with(score, row, problem):
    if isinstance(row, dict) and "prediction" in row:
        row = {"probability": 1, "probabilities": dict.fromkeys(LABELS, 1), **row}
        row = {name: row[name] for name in ("id", "prompt", "prediction", "probability", "probabilities")}
    write_jsonl("out.jsonl", [row])
    before = Path("out.jsonl").read_bytes()
    code, _, said = score("prompts.jsonl", "-o", "out.jsonl", "--resume")
    assert code == 2
    assert problem in only_line(said)
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("out.jsonl", "my notes"),
        ("out.jsonl", '{"id": 7, "prom'),
        ("out.csv", "my notes"),
        ("out.csv", "id,prompt,mark\n"),
        ("out.csv", '"a quote that is never closed\n1,2,3\n'),
        # A quote too many in the first row, behind which the others would be one field.
        ("out.csv", 'id,prompt,prediction,probability,probabilities\n0,a,"good,1,"{}"\n1,b,good,1,"{}"\n'),
    ],
)
def test_what_would_be_cut_off_must_be_a_beginning_of_our_row(score, name, content):
    write_jsonl("prompts.jsonl", [{"id": idx, "prompt": prompt} for idx, prompt in enumerate("abc")])
    Path(name).write_text(content)
    before = Path(name).read_bytes()
    code, _, said = score("prompts.jsonl", "-o", name, "--resume")
    assert code == 2
    assert "ends in a row that does not come from line 1" in only_line(said)
    assert Path(name).read_bytes() == before


@pytest.mark.usefixtures("no_model")
def test_what_stands_behind_all_rows_is_not_cut_off(score, run, model):
    row = {"id": 0, "prompt": PROMPTS[0], "prediction": "good", "probability": 1}
    write_jsonl("prompts.jsonl", [{"id": 0, "prompt": PROMPTS[0]}])
    write_jsonl("out.jsonl", [{**row, "probabilities": dict.fromkeys(LABELS, 1)}])
    with open("out.jsonl", "a") as file:
        file.write("my notes")
    before = Path("out.jsonl").read_bytes()
    code, _, said = score("prompts.jsonl", "-o", "out.jsonl", "--resume")
    assert code == 2
    assert "the input, which has no more" in only_line(said)
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("mode", ["--overwrite", "--resume"])
def test_what_is_there_stays_until_there_are_new_rows(run, score, monkeypatch, mode):
    Path("out.jsonl").write_text('{"id": 0, "pro')

    def fail(*arguments, **options):
        raise RuntimeError("no")

    arguments = ["score", "prompts.jsonl", "--completions", "labels.txt", "-o", "out.jsonl", mode]
    assert run(*arguments, "--model", "nowhere/at-all")[0] == 2
    assert Path("out.jsonl").read_text() == '{"id": 0, "pro'
    monkeypatch.setattr("backprompt.classify.predict_proba", fail)
    assert score("prompts.jsonl", "-o", "out.jsonl", mode)[0] == 3
    assert Path("out.jsonl").read_text() == '{"id": 0, "pro'
    assert not Path("out.jsonl.options.json").exists()


def test_an_output_is_gone_on_with_by_the_same_options(generate, monkeypatch):
    write_jsonl("prompts.jsonl", [*PROMPTS, "x " * 500])
    options = ["prompts.jsonl", "-o", "out.jsonl", "--slice", "2"]
    assert generate(*options, "--temperature", "0.8", "--seed", "1")[0] == 2  # the last one is too long
    assert Path("out.jsonl.options.json").exists()
    before = Path("out.jsonl").read_bytes()
    code, _, said = generate(*options, "--temperature", "0.9", "--seed", "1", "--resume")
    assert code == 2
    assert "was begun with another --temperature: 0.8, not 0.9" in only_line(said)
    assert Path("out.jsonl").read_bytes() == before
    write_jsonl("prompts.jsonl", PROMPTS)
    assert generate(*options, "--temperature", "0.8", "--seed", "1", "--resume")[0] == 0
    assert not Path("out.jsonl.options.json").exists()


@pytest.mark.usefixtures("no_model")
def test_a_file_with_the_name_of_the_options_stays(score):
    Path("out.jsonl.options.json").write_text('{"mine": 1}')
    code, _, said = score("prompts.jsonl", "-o", "out.jsonl")
    assert code == 2
    assert "out.jsonl.options.json was not written by backprompt" in only_line(said)
    assert Path("out.jsonl.options.json").read_text() == '{"mine": 1}'


def test_completions_are_read_once_and_lines_end_where_they_do(run, model):
    labels = "good\r\nbad\u2028or\x0bso\x85so\nso so\n"
    found = []
    os.mkfifo("pipe")
    for path in ("labels.txt", "pipe"):
        writer = threading.Thread(target=Path(path).write_bytes, args=[labels.encode()])
        writer.start()
        if path == "labels.txt":
            writer.join()
        arguments = ["explain", "prompts.jsonl", "--completions", path, "--model", model, "--device", "cpu", "--json"]
        found.append(json.loads(run(*arguments)[1])["num_texts"])
        writer.join()
    assert found == [3 * len(PROMPTS)] * 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--temperature", "0"], "transformers refuses these options"),
        (["--top-k", "-3"], "--top-k must be an int of at least 0, not -3"),
        (["--seed", "-1"], "argument --seed: -1 is not at least 0"),
        (["--stop", ""], "argument --stop: the string must not be empty"),
        (["--option", "foo=1"], "generate has no option 'foo'"),
        (["--option", "max_new_tokens=4"], "Give it once, as --max-new-tokens"),
        (["--option", "include_stop=true"], "Give it once, as --include-stop"),
        (["--temperature", "1", "--option", "temperature=0.5"], "Give it once, as --temperature"),
    ],
)
def test_bad_options_of_generation(generate, arguments, problem):
    code, printed, said = generate("prompts.jsonl", "-o", "out.jsonl", *arguments)
    assert (code, printed) == (2, "")
    assert problem in only_line(said)
    assert "line 1 of" not in said
    assert not Path("out.jsonl").exists()


IN_OPTIONS = [
    ("score", ["--completions", "one.json"], "Set --no-normalize, or give more"),
    ("score", ["--completions", "empty.json"], "completion 2 of --completions is empty"),
    ("score", ["--completions", "half.json"], "lone surrogate"),
    ("score", ["--completions", "labels.txt", "--prior", "0.5,0.5"], "error: --prior has the shape (2,)"),
    ("score", ["--completions", "labels.txt", "--joins", "error"], "--joins exact or --joins split"),
    ("draw", ["-o", "tree.svg", "--max-children", "1"], "error: --max-children must be"),
    ("verify", ["--tolerance", "-1"], "error: --tolerance must be"),
    ("generate", ["--option", "max_length=3"], "use --max-new-tokens, which does not count the prompt"),
    (
        "generate",
        ["--option", "return_dict=1"],
        "It has --max-new-tokens, --stop, --include-stop, --seed, --regex, --json-schema, and with --option",
    ),
    ("generate", ["--temperature", "0.5", "--option", "do_sample=false"], "error: --temperature is for sampling"),
    ("generate", ["--temperature", "0"], "these options: --temperature (=0.0)"),
    ("generate", ["--temperature", "1", "--option", "num_beams=2"], "beam search (--option num_beams=N)"),
    ("generate", ["--max-new-tokens", "1000"], "there is no room for --max-new-tokens 1000."),
    (
        "generate",
        ["--option", "guidance_scale=2", "--stop", "'temperature=1'"],
        "generate does not support classifier-free",
    ),
]


@pytest.mark.parametrize(("command", "arguments", "problem"), IN_OPTIONS)
def test_the_librarys_errors_speak_of_options(run, model, command, arguments, problem):
    write_jsonl("prompts.jsonl", [{"parts": ["Set normalize=False. The c", "at s", "at"]}])
    for name, labels in {"one": ["good"], "empty": ["good", ""], "half": ["good", "\ud83d"]}.items():
        Path(f"{name}.json").write_text(json.dumps(labels))
    own = {"generate": ["--max-new-tokens", 4]}.get(command, [])
    code, _, said = run(command, "prompts.jsonl", "--model", model, "--device", "cpu", *own, *arguments)
    assert code == 2
    assert problem in only_line(said)
    without_quoted = re.sub(r"(?<!\w)'[^']*'", "", said)
    assert re.findall(r"(?<!--option )\b[a-z_]+=[^0\s]|\w\(\.\.\.", without_quoted) == []


def test_what_errors_quote_stays_as_it_is():
    said = (
        "Text('set normalize=False') has no room for max_new_tokens=3, \"n=2\"; num_beams=3, model's `top_k`, 'top_p'"
    )
    expected = said.replace("max_new_tokens=3", "--max-new-tokens 3").replace("num_beams=3", "--option num_beams=3")
    expected = expected.replace("`top_k`", "--top-k")
    assert in_options(said) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.usefixtures("no_model")
def test_a_device_that_is_not_there(score):
    code, _, said = score("prompts.jsonl", "--device", "cuda")
    assert code == 2
    assert only_line(said).startswith("backprompt: error: --device cuda cannot be used: ")


@pytest.mark.usefixtures("no_model")
def test_closed_output_and_empty_input(score, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    code, _, said = score("-")
    assert (code, only_line(said)) == (2, "backprompt: error: standard input has no rows.")
    monkeypatch.setattr(sys, "stdout", None)
    code, _, said = score("prompts.jsonl")
    assert code == 2
    assert "standard output is closed" in only_line(said)


def test_a_prompt_that_is_too_long_is_named(score):
    write_jsonl("prompts.jsonl", [*PROMPTS, "x " * 500])
    code, _, said = score("prompts.jsonl", "-o", "out.jsonl", "--slice", "4")
    assert code == 2
    assert only_line(said).startswith(f"backprompt: error: line {len(PROMPTS) + 1} of prompts.jsonl: Text('x x x")
    assert len(read_jsonl("out.jsonl")) == 4  # the slices before it


def test_a_model_that_cannot_be_loaded(run):
    arguments = ["score", "prompts.jsonl", "--completions", "labels.txt", "--model", "nowhere/at-all"]
    code, _, said = run(*arguments)
    assert code == 2
    assert only_line(said).startswith("backprompt: error: Could not load 'nowhere/at-all'")


def test_an_error_that_nobody_foresaw_has_its_own_code_and_a_traceback_on_request(score, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("backprompt.classify.predict_proba", fail)
    code, _, said = score("prompts.jsonl")
    assert code == 3
    assert only_line(said) == "backprompt: error: RuntimeError: two lines (--traceback shows where)"
    with pytest.raises(RuntimeError, match="two"):
        score("prompts.jsonl", "--traceback")


def test_no_command(run):
    assert run()[0] == 2
    code, printed, _ = run("--version")
    assert (code, printed) == (0, f"backprompt {backprompt.__version__}\n")


def test_help_and_wrong_options_need_not_wait_for_torch(model):
    slow = {"torch", "transformers", "fastapi", "uvicorn", "llguidance"}
    program = "import sys; from backprompt.cli import main\n"
    program += f"try: main(sys.argv[1:])\nexcept SystemExit: pass\nprint(sorted({slow} & sys.modules.keys()))"
    for arguments in (
        ["--help"],
        ["score", "--help"],
        ["serve", "--help"],
        ["--version"],
        ["score", "--no-such-option"],
    ):
        with in_a_process("-c", program, *arguments) as process:
            assert process.stdout.read().splitlines()[-1] == b"[]"


def test_choices_are_those_of_the_library():
    assert AGGREGATES == backprompt.classify.AGGREGATES


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["score"],
        ["generate"],
        ["serve"],
        ["explain"],
        ["draw"],
        ["verify"],
        ["demo"],
        ["store"],
        ["store", "prune"],
    ],
)
def test_help_teaches(run, command):
    code, printed, _ = run(*command, "--help")
    assert code == 0
    assert "usage: backprompt" in printed
    assert command == ["store"] or f"backprompt {' '.join(command)}".strip() in printed.partition("examples:")[2]


# Messages and bars


def test_messages_on_request(score):
    said = score("prompts.jsonl", "-v")[2]
    assert "backprompt: info: Loading " in said
    assert "backprompt: info: Attention of GPT2LMHeadModel runs on the kernel" in said
    assert "debug" not in said
    assert "backprompt: debug: Evicted" in score("prompts.jsonl", "-vv", "--memory", "10 kB", "--slice", "1")[2]
    assert logging.getLogger("backprompt").level == logging.NOTSET
    assert [type(handler) for handler in logging.getLogger("backprompt").handlers] == [logging.NullHandler]


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u200b"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e]")


@pytest.mark.parametrize(
    "arguments",
    [
        [f"{HOSTILE}.jsonl"],
        ["bad.jsonl"],
        [f"{HOSTILE} there.jsonl"],
        ["prompts.jsonl", f"--{HOSTILE}"],
        ["prompts.jsonl", "--slice", HOSTILE],
        ["prompts.jsonl", "--device", HOSTILE],
        ["prompts.jsonl", "--model", HOSTILE],
        ["prompts.jsonl", "--prior", HOSTILE],
        ["prompts.jsonl", "--column", HOSTILE],
        ["prompts.jsonl", "--memory", HOSTILE],
        ["prompts.jsonl", "--completions", "repeated.txt"],
        ["prompts.jsonl", "-o", f"{HOSTILE}/out.jsonl"],
        ["prompts.jsonl", "-o", f"{HOSTILE} there.jsonl"],
    ],
)
def test_errors_on_a_terminal_have_no_control_characters(score, arguments):
    Path("repeated.txt").write_text(f"{HOSTILE}\n{HOSTILE}\n")
    write_jsonl(f"{HOSTILE} there.jsonl", [{HOSTILE: HOSTILE}])
    Path("bad.jsonl").write_text(json.dumps({"prompt": {HOSTILE: HOSTILE}}, ensure_ascii=False))
    code, _, said = score(*arguments)
    assert code == 2
    assert CONTROL.search(said) is None
    only_line(said)


def test_messages_and_tables_on_a_terminal_have_no_control_characters(score, run, model, monkeypatch):
    def warn(*arguments, **options):
        logging.getLogger("backprompt.test").warning("a file called %s", HOSTILE)
        raise RuntimeError(HOSTILE)

    text = f"The cat sat on the mat{HOSTILE}, and so on: one, two, three, four."
    write_jsonl("prompts.jsonl", [text, f"{text} And"])
    Path("labels.txt").write_text(f"{HOSTILE}a\nb\n")
    options = ["--model", model, "--device", "cpu"]
    printed = [score("prompts.jsonl", "--store", "prompts.bp")[1]]
    for command in (["store", "ls", "prompts.bp"], ["explain", "prompts.jsonl", *options]):
        printed += [run(*command)[1], run(*command, "--json")[1]]
    printed += [run("verify", "prompts.jsonl", *options)[1], run("draw", "prompts.jsonl", "-o", "-", *options)[1]]
    monkeypatch.setattr("backprompt.classify.predict_proba", warn)
    printed.append(score("prompts.jsonl")[2])
    assert "a file called \\x1b]0;title" in printed[-1]
    for shown in printed:
        assert shown
        assert CONTROL.search(shown) is None


def test_a_bar_where_standard_error_is_a_terminal(score, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    said = score("prompts.jsonl")[2]
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in said
    assert "evaluating" not in said  # one bar is enough
    assert score("prompts.jsonl", "--no-progress")[2] == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_librarys_own_bars_need_a_terminal_too(run, model, monkeypatch, is_terminal):
    monkeypatch.setattr("backprompt.progress.DELAY_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    write_jsonl("prompts.jsonl", [f"{word} " * 50 for word in "abcdefghijklmnopqrst"])  # several passes
    arguments = ["explain", "prompts.jsonl", "--run", "--model", model, "--device", "cpu"]
    code, _, said = run(*arguments)
    assert code == 0
    assert ("evaluating: 100%" in said) == is_terminal
    assert "evaluating" not in run(*arguments, "--no-progress")[2]


# explain, draw, verify


def test_explain_computes_nothing_unless_asked(run, model, monkeypatch):
    lms = []

    def remembered(*arguments, **options):
        lms.append(load(*arguments, **options))
        return lms[-1]

    monkeypatch.setattr("backprompt.load", remembered)
    arguments = ["explain", "prompts.jsonl", "--completions", "labels.txt", "--model", model, "--device", "cpu"]
    code, printed, said = run(*arguments, "--json")
    found = json.loads(printed)
    assert (code, said) == (0, "")
    assert lms[0].stats.tokens_computed == 0
    texts = [Text(f"{prompt} {label}", lms[0]) for prompt in PROMPTS for label in LABELS]
    assert found["num_texts"] == len(texts)
    assert found["tokens_requested"] == sum(len(text.tokens) for text in texts)
    actual = json.loads(run(*arguments, "--json", "--run")[1])["actual"]
    assert lms[1].stats.tokens_computed == actual["tokens_computed"] == found["tokens_to_compute"] > 0
    assert f"{found['tokens_to_compute']:,}" in run(*arguments)[1]


def test_verify(run, model):
    arguments = ["verify", "prompts.jsonl", "--model", model, "--device", "cpu", "--fail-on-drift"]
    code, printed, said = run(*arguments)
    assert (code, said) == (0, "")
    assert printed.startswith("The same as the plain call")
    code, printed, _ = run(*arguments, "--tolerance", "0", "--sample", "2", "--json")
    found = json.loads(printed)
    assert code == 1
    assert (found["passed"], found["num_texts"], found["num_given"]) == (False, 2, len(PROMPTS))
    assert 0 < found["largest_gap"] < 1e-4
    assert run(*arguments[:-1], "--tolerance", "0")[0] == 0


def test_draw_needs_no_model(run, monkeypatch):
    pytest.importorskip("pygraphviz")
    monkeypatch.setattr("backprompt.load", None)
    write_jsonl("prompts.jsonl", [{"parts": ["Once ", "upon"]}, {"parts": ["Once ", "more <&>"]}])
    assert run("draw", "prompts.jsonl", "-o", "tree.svg") == (0, "", "")
    expected = backprompt.draw([Text("Once ") + "upon", Text("Once ") + "more <&>"]).pipe("svg")
    assert b"<svg" in expected
    assert Path("tree.svg").read_bytes() == expected
    assert run("draw", "prompts.jsonl", "-o", "tree.png")[0] == 0
    assert Path("tree.png").read_bytes().startswith(b"\x89PNG")
    code, printed, _ = run("draw", "prompts.jsonl", "-o", "-")
    assert code == 0
    assert "<svg" in printed
    assert Path("prompts.jsonl").exists()


def test_draw_shows_what_was_computed(run, model):
    arguments = ["draw", "prompts.jsonl", "--model", model, "--device", "cpu", "-o", "tree.gv"]
    assert run(*arguments)[0] == 0
    lm = load(model, device="cpu")
    before, after = PROMPTS[0].split(" great")
    texts = [Text(before, lm) + prompt.removeprefix(before) for prompt in PROMPTS]
    assert all(text.string.endswith(after) for text in texts)
    not_evaluated = backprompt.draw(texts).source
    assert Path("tree.gv").read_text(encoding="utf-8") == not_evaluated
    assert run(*arguments, "--run")[0] == 0
    lm.evaluate(texts)
    assert Path("tree.gv").read_text(encoding="utf-8") == backprompt.draw(texts).source != not_evaluated


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-o", "tree.txt"], "a picture's name ends in one of .svg"),
        (["-o", "nowhere/tree.svg"], "there is no folder nowhere"),
        (["-o", "tree.svg", "--run"], "--run and --store need a model"),
        (["-o", "tree.svg", "--completions", "nowhere.txt"], "--completions nowhere.txt: no such file"),
        (["-o", "tree.svg", "--max-children", "1"], "--max-children must be"),
        ([], "required: -o/--output"),
        (["-o", "folder.svg"], "folder.svg is a folder"),
    ],
)
def test_bad_pictures(run, arguments, problem):
    Path("folder.svg").mkdir()
    code, _, said = run("draw", "prompts.jsonl", *arguments)
    assert code == 2
    assert problem in only_line(said)
    assert not Path("tree.svg").exists()


# store


@pytest.fixture
def store(model) -> Path:
    """A store with two entries, the second behind the first."""
    lm = load(model, device="cpu", store="prompts.bp")
    Text("Question: What is 12 + 34?", lm).save()
    Text("Question: What is 12 + 34?  Answer: 46.", lm).save()
    Text("The cat sat on the mat.", lm).save()
    return Path("prompts.bp")


def test_store_ls_find_and_stat(run, store):
    code, printed, said = run("store", "ls", store)
    assert (code, said) == (0, "")
    assert len(printed.splitlines()) == 3
    assert '"The cat sat on the mat."' in printed.splitlines()[-1]
    code, printed, _ = run("store", "find", store, "The cat", "--json")
    (found,) = [json.loads(line) for line in printed.splitlines()]
    assert code == 0
    assert found["text"] == "The cat sat on the mat."
    with backprompt.DiskStore(store, persist="never") as opened:
        (header,) = opened.find("The cat")
        stats = opened.stats()
    assert (found["name"], found["num_tokens"]) == (header.name, len(header.token_ids))
    assert run("store", "find", store, "The dog") == (1, "", "")
    described = json.loads(run("store", "stat", store, "--json")[1])
    assert (described["num_entries"], described["num_bytes"]) == (3, stats.num_bytes)
    assert f"{stats.num_bytes:,}" in run("store", "stat", store)[1]


def test_store_verify(run, store):
    assert run("store", "verify", store)[:2] == (0, "")
    (damaged, *_) = sorted(store.glob("entries/*/*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    code, printed, said = run("store", "verify", store)
    assert (code, printed) == (1, f"{damaged.stem}\n")
    assert "warning" in said
    assert "2 entries are sound, 1 damaged." in said
    assert json.loads(run("store", "verify", store, "--json")[1]) == {"num_entries": 2, "damaged": []}


def test_store_prune(run, store):
    assert "3 entries are left" in run("store", "prune", store, "1 GB")[1].replace("; 3 are", "; 3 entries are")
    num_bytes = json.loads(run("store", "stat", store, "--json")[1])["num_bytes"]
    assert len(json.loads(run("store", "prune", store, num_bytes - 1, "--json")[1])["deleted"]) == 1
    assert json.loads(run("store", "prune", store, "0", "--json")[1])["num_entries"] == 0
    assert run("store", "prune", store, "some")[0] == 2


def test_one_entry_is_one(run, model):
    Text("Question: What is 12 + 34?", load(model, device="cpu", store="prompts.bp")).save()
    assert "1 entry is sound, 0 damaged." in run("store", "verify", "prompts.bp")[2]
    assert "0 entries deleted; 1 is left" in run("store", "prune", "prompts.bp", "1 GB")[1]
    assert "1 entry deleted; 0 are left" in run("store", "prune", "prompts.bp", "0")[1]


def test_looking_into_a_store_makes_none(run):
    code, _, said = run("store", "ls", "nowhere.bp")
    assert code == 2
    assert "nowhere.bp is not a store" in only_line(said)
    assert not Path("nowhere.bp").exists()


@pytest.mark.parametrize("path", ["prompts.jsonl", "prompts.jsonl/below", "x" * 5000, "a\0b", "", "."])
def test_a_path_of_no_store_is_said_in_a_line(run, path):
    """And nothing is made there."""
    before = sorted(os.listdir())
    for command in (["ls"], ["stat"], ["find", "a"], ["verify"], ["prune", "0"]):
        code, _, said = run("store", command[0], path, *command[1:])
        assert code == 2
        assert only_line(said).startswith("backprompt: error: [Errno")
    assert sorted(os.listdir()) == before


# demo


def test_demo(run, model, monkeypatch):
    """The example itself is tested in test_examples.py."""
    before = {name: sys.modules.get(name) for name in ("intents", "demo_model", "plain")}
    path = list(sys.path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("nothing-here").absolute()))
    code, printed, said = run("demo")
    assert (code, printed) == (2, "")
    assert only_line(said).startswith("backprompt: error: The demo model is not installed.")
    Path("questions.tsv").write_text("where is my parcel\ttrack an order\n")
    code, _, said = run("demo", "--model", "nowhere/at-all", "--questions", "questions.tsv")
    assert code == 2
    assert "Could not load 'nowhere/at-all'" in only_line(said)
    assert {name: sys.modules.get(name) for name in before} == before
    assert sys.path == path


def test_input_names_the_lines_of_csv_with_breaks_in_them():
    Path("in.csv").write_text('prompt\n"a\nb"\nc\n')
    assert [row.where for row in Input("in.csv", "csv").rows()] == ["line 3 of in.csv", "line 4 of in.csv"]


# Documentation

ROOT = Path(__file__).parent.parent


def test_documented_commands_run(run, model):
    """Each of them exits with 0, in their order, in a folder with prompts, labels and a model called gpt2."""
    Path("gpt2").symlink_to(model)
    write_jsonl(
        "prompts.jsonl", [{"id": idx, "prompt": f"Review: A {word}\nSentiment:"} for idx, word in enumerate("xyz")]
    )
    Path("prompts.csv").write_text("prompt\nReview: A\n")
    Path("person.json").write_text('{"type": "integer"}')
    backprompt.DiskStore("prompts.bp").close()
    page_text = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page_text, flags=re.DOTALL)
    commands = [
        part
        for block in blocks
        for line in block.splitlines()
        for part in line.split(" | ")
        if part.startswith("backprompt ")
    ]
    assert len(commands) >= 5
    stdin = io.TextIOWrapper(io.BytesIO(Path("prompts.jsonl").read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        for command in commands:
            code, _, said = run(*shlex.split(command, comments=True)[1:])
            assert code == 0, (command, said)


def test_documented_python_runs():
    page = (ROOT / "docs/command_line.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    logger = logging.getLogger("backprompt")
    before = logger.level
    try:
        exec(block, {})
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)


def test_documented_exit_codes_are_those_of_the_help(run):
    documented = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/command_line.md").read_text(), re.MULTILINE)
    _, printed, _ = run("--help")
    assert len(documented) == 6
    for code, meaning in documented:
        assert f"  {code:<5}{meaning}\n" in printed

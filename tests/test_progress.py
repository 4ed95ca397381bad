"""Bars show when they are asked for or work takes long, and count it; messages are silent by default."""

import io
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

import backprompt
from backprompt import LM, DiskStore, Text, evaluate, independence_gap, progress
from backprompt.classify import predict_proba, token_logprobs
from backprompt.progress import Bar, GrowingBar, progress_bar, showing


@pytest.fixture
def lm(model, tokenizer) -> LM:
    return LM(model, tokenizer, max_tokens_per_forward=8)


@pytest.fixture
def texts(lm) -> list[Text]:
    return [Text("The cat sat on the mat, and ", lm) + end for end in ("the other cat", "they're sure", "we'll see")]


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Work of any length is long, and standard error is a terminal."""
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "is_terminal", lambda: True)


@pytest.fixture
def is_shown(capsys):
    """Whether something does so on standard error."""

    def shows(*descriptions: str) -> list[bool]:
        said = capsys.readouterr().err
        return [f"{description}: 100%" in said for description in descriptions]

    return shows


def test_evaluate_counts_tokens(texts, lm, capsys):
    evaluate(texts, show_progress_bar=True)
    num_tokens = lm.stats.tokens_computed
    assert f"{num_tokens}/{num_tokens}" in capsys.readouterr().err
    assert lm.stats.forward_passes > 1


def test_only_a_terminal_shows_bars_that_nobody_asked_for(texts, lm, is_shown, monkeypatch):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    evaluate(texts)
    backprompt.generate(texts, max_new_tokens=2)
    assert is_shown("evaluating", "generating") == [False, False]
    lm.clear()
    evaluate(texts, show_progress_bar=True)
    assert is_shown("evaluating") == [True]


def test_short_work_shows_nothing_by_default(texts, is_shown):
    evaluate(texts)
    assert is_shown("evaluating", "scoring") == [False, False]


@pytest.mark.usefixtures("at_once")
def test_long_work_shows_a_bar_unless_it_is_turned_off(texts, lm, is_shown, monkeypatch):
    evaluate(texts)
    assert is_shown("evaluating") == [True]
    lm.clear()
    evaluate(texts, show_progress_bar=False)
    assert is_shown("evaluating") == [False]
    lm.clear()
    evaluate(texts[0])
    assert is_shown("evaluating") == [True]
    lm.clear()
    evaluate(texts[0], show_progress_bar=False)
    assert is_shown("evaluating") == [False]


@pytest.mark.usefixtures("at_once")
def test_one_pass_shows_no_bar_unless_asked_for(model, tokenizer, is_shown):
    lm = LM(model, tokenizer)
    lm.evaluate([Text("The cat", lm)])
    assert is_shown("evaluating") == [False]
    lm.evaluate([Text("The mat", lm)], show_progress_bar=True)
    assert is_shown("evaluating") == [True]


@pytest.mark.usefixtures("at_once")
def test_each_function_can_be_silenced(texts, lm, is_shown):
    calls = {
        "token_logprobs": lambda show: lm.token_logprobs(texts, show_progress_bar=show),
        "token_scores": lambda show: lm.token_scores(texts, show_progress_bar=show),
        "next_token_logprobs": lambda show: lm.next_token_logprobs(texts, [[1, 2]] * 3, show_progress_bar=show),
        "entropies": lambda show: lm.entropies(texts, show_progress_bar=show),
        "top_logprobs": lambda show: lm.top_logprobs(texts, 2, show_progress_bar=show),
        "independence_gap": lambda show: independence_gap(texts, show_progress_bar=show),
        "classify.token_logprobs": lambda show: token_logprobs(texts, show_progress_bar=show),
    }
    for name, call in calls.items():
        lm.clear()
        call(False)
        assert is_shown("evaluating") == [False], name
        lm.clear()
        call(None)
        assert is_shown("evaluating") == [True], name


@pytest.mark.usefixtures("at_once")
def test_one_bar_at_a_time(texts, lm, is_shown):
    predict_proba(texts, ["a cat", "a mat"], lm, show_progress_bar=True)
    assert is_shown("prompts", "evaluating", "scoring") == [True, False, False]
    lm.clear()
    backprompt.generate(texts, max_new_tokens=2, show_progress_bar=True)
    assert is_shown("generating", "evaluating") == [True, False]
    lm.clear()
    backprompt.generate(texts, max_new_tokens=2, show_progress_bar=False)
    assert is_shown("generating", "evaluating") == [False, False]


@pytest.mark.usefixtures("at_once")
def test_a_long_continuation_of_one_text_shows_a_bar(texts, lm, capsys):
    for show in (None, False):
        text = texts[0].generate(max_new_tokens=5, show_progress_bar=show)
        assert len(text.completion_tokens) == 5
        assert ("generating: 100%" in (said := capsys.readouterr().err)) == (show is None)
        assert "evaluating" not in said
    texts[0].generate(max_new_tokens=1)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("at_once")
def test_scoring_shows_a_bar(texts, lm, is_shown, monkeypatch):
    evaluate(texts, show_progress_bar=False)
    evaluator = lm.session.evaluator
    monkeypatch.setattr(type(evaluator.executor), "rows_in_a_slice", 4)
    lm.token_logprobs(texts)
    assert is_shown("scoring") == [True]


@pytest.mark.usefixtures("at_once")
def test_hashing_and_stores_show_bars(texts, lm, model, tokenizer, tmp_path, is_shown):
    assert len(lm.fingerprint) == 64
    assert is_shown("hashing weights") == [True]
    stored = LM(model, tokenizer, store=tmp_path / "prompts.bp")
    for text in texts:
        Text(text.string, stored).save()
    is_shown()
    with DiskStore(tmp_path / "prompts.bp") as store:
        for show in (None, False):
            assert store.verify(show_progress_bar=show) == []
            store.rebuild(show_progress_bar=show)
            store.prune(store.stats().num_bytes - 1, show_progress_bar=show)
            assert is_shown("verifying", "indexing", "deleting") == [show is None] * 3


@pytest.mark.usefixtures("at_once")
def test_an_outer_setting_holds_for_what_is_not_asked(texts, lm, is_shown):
    with showing(False):
        evaluate(texts)
    assert is_shown("evaluating") == [False]
    lm.clear()
    with pytest.raises(KeyError), showing(False):
        raise KeyError
    evaluate(texts)
    assert is_shown("evaluating") == [True]


def test_a_growing_bar_follows_its_plans(capsys):
    with showing(True), GrowingBar("evaluating", "tokens") as bar:
        bar.expect(10, is_long=True)
        bar.update(4)
        bar.expect(8, is_long=True)  # two more than were planned
        bar.update(8)
    assert "12/12" in capsys.readouterr().err


def test_a_bar_that_nobody_sees_costs_nothing(capsys):
    with showing(False), progress_bar(10, "evaluating", "tokens") as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_the_library_is_silent_until_a_program_listens(monkeypatch, capfd):
    """A warning with no handler on its way would go to standard error."""
    monkeypatch.setattr(logging.getLogger("backprompt"), "propagate", False)  # pytest listens further up
    logging.getLogger("backprompt.store.disk").warning("for those who listen")
    assert capfd.readouterr().err == ""


def test_messages_say_what_was_done(model, tokenizer, caplog):
    caplog.set_level(logging.DEBUG, logger="backprompt")
    lm = LM(model, tokenizer, memory_bytes=4_000)
    lm.evaluate([Text("The cat sat on the mat.", lm)])
    lm.evaluate([Text("Question: What is 12 + 34?", lm)])
    assert "Attention of GPT2LMHeadModel runs on the kernel" in caplog.text
    assert "Evicted" in caplog.text


class Interrupted(io.StringIO):
    """A terminal on which drawing is interrupted, each time after one more write."""

    def __init__(self, num_writes: int) -> None:
        super().__init__()
        self.num_writes = num_writes

    def write(self, string: str) -> int:
        self.num_writes -= 1
        if self.num_writes == -1:
            raise KeyboardInterrupt
        return super().write(string)


@pytest.mark.parametrize("num_writes", range(12))
def test_an_interrupt_leaves_no_lock_behind(num_writes):
    """Else a bar in another thread, and tqdm's own, would wait for ever."""
    try:
        with Bar(total=3, file=Interrupted(num_writes), mininterval=0) as bar:
            bar.update()
            bar.refresh()
            bar.clear()
            Bar.write("said", file=bar.fp)
    except KeyboardInterrupt:
        pass

    def is_free() -> bool:
        is_taken = Bar.get_lock().acquire(timeout=1)
        if is_taken:
            Bar.get_lock().release()
        return is_taken

    with ThreadPoolExecutor() as pool:
        assert pool.submit(is_free).result()

"""Tokens coloured by log-probability and by attention, against the plain model; bars and heat maps."""

import builtins
import html
import re
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch

from backprompt import LM, MissingDependencyError, Text, UnboundTextError, plot_attention, plot_probabilities
from backprompt.inspection.show import ATTENTION, SHADES
from reference import plain_attention
from tiny_models import build
from tiny_tokenizers import TOKENIZERS

mpl.use("Agg")
MODEL = build("gpt2", vocab_size=1000)


@pytest.fixture(params=TOKENIZERS)
def lm(request: pytest.FixtureRequest) -> LM:
    return LM(MODEL, TOKENIZERS[request.param]())


@pytest.fixture
def gpt2() -> LM:
    return LM(MODEL, TOKENIZERS["byte_level_bpe"]())


def test_tokens_and_alternatives_are_those_of_the_plain_model(lm: LM) -> None:
    text = Text("the ref", lm) + "und is due"
    shown = text.show(top=3)
    assert tuple(token.token_id for token in shown.tokens) == text.tokens
    with torch.no_grad():
        logits = MODEL(torch.tensor([text.tokens])).logits[0].log_softmax(dim=-1)  # (tokens, vocab)
    assert shown.tokens[0].alternatives == ()
    for row, token in zip(logits, shown.tokens[1:], strict=False):
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
        assert [p for _, p in token.alternatives] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_strings_of_tokens_make_up_the_text(gpt2: LM) -> None:
    text = Text("the refund\n is due", gpt2)
    assert "".join(token.string for token in text.show(top=0).tokens) == text.string
    *parts, last = Text("東", gpt2).show(top=0).tokens  # one character in several tokens
    assert len(parts) > 0
    assert last.string == "東"
    assert "東" in Text("東", gpt2).show(top=0).plain()


def test_a_branch_is_predicted_by_what_the_group_stands_behind(gpt2: LM) -> None:
    text = Text("context", gpt2) + (Text(" one", gpt2) | " two") + " end of it"
    shown = text.show(top=1000)  # the whole vocabulary
    num_unpredicted = 0
    for token in shown.tokens:
        if token.alternatives:
            assert min(abs(token.logprob - p) for _, p in token.alternatives) < 1e-4
        else:
            num_unpredicted += 1
            assert np.isnan(token.logprob)
    assert num_unpredicted == 2  # the first of all, and the first behind the group
    context = Text("context", gpt2)
    first_of_branch = next(token for token in shown.tokens[1:] if token.begins_segment)
    ids = list(context.tokens)
    with torch.no_grad():
        expected = MODEL(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1).max().item()
    assert first_of_branch.alternatives[0][1] == pytest.approx(expected, abs=1e-4)


def test_without_alternatives_only_what_predicts_is_computed(gpt2: LM) -> None:
    text = Text("the refund is due", gpt2)
    _ = text.token_logprobs
    before = gpt2.stats
    text.show(top=0)
    assert gpt2.stats.logit_rows == before.logit_rows
    text.show(top=2)
    assert gpt2.stats.logit_rows == before.logit_rows + len(text.tokens) - 1


def test_html_has_each_token_with_what_is_told_of_it(gpt2: LM) -> None:
    text = Text('a <b>"&', gpt2) + "\n東京</b>"
    shown = text.show(top=2)
    page = shown._repr_html_()
    spans = re.findall(r'<span style="([^"]*)" title="([^"]*)">([^<]*)</span>', page)
    assert len(spans) == len(shown.tokens)
    assert "<b>" not in page
    drawn = "".join(html.unescape(content) for _, _, content in spans)
    assert drawn.replace("·", "").startswith('a <b>"&↵\n')
    style, title, _ = spans[1]
    told = html.unescape(title).splitlines()
    assert f"id {shown.tokens[1].token_id}" in told[0]
    assert [line[:3] for line in told[1:]] == ["1. ", "2. "]
    assert "rgba" in style
    assert not re.search(r"(?<!-)color:", style)  # letters keep the page's colour


def test_colours_only_for_terminals_and_not_if_told_so(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Text("the refund is due", gpt2).show(top=0)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert "\x1b" not in str(shown)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert str(shown) == shown.ansi()
    assert "\x1b[" in shown.ansi()
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown.ansi()).startswith("¦the refund is due\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert str(shown) == repr(shown) == shown.plain()
    assert "\x1b" not in str(shown)


def test_shades_follow_the_probability(gpt2: LM) -> None:
    shown = Text("the refund is due", gpt2).show(top=0)
    marks = shown.plain().split("\n")[0]
    for token in shown.tokens[1:]:
        expected = next(shade.mark for shade in SHADES if np.exp(token.logprob) >= shade.least)
        assert f"{expected}{token.string}" in marks
    assert len({token.logprob for token in shown.tokens}) > 2


def luminance(colour: int) -> float:
    """Of one of the 256 colours of terminals, of the 6 x 6 x 6 colours among them."""
    levels = [(0, 95, 135, 175, 215, 255)[(colour - 16) // step % 6] / 255 for step in (36, 6, 1)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("is_dark", [True, False])
def test_the_less_probable_the_more_it_stands_out_from_the_ground(gpt2: LM, is_dark: bool) -> None:
    legend = Text("a", gpt2).show(top=0).ansi(is_dark=is_dark).rsplit("\n", 1)[1]
    painted = [tuple(map(int, pair)) for pair in re.findall(r"38;5;(\d+);48;5;(\d+)m", legend)]
    distances = [contrast(luminance(ground), 0.0 if is_dark else 1.0) for _, ground in painted]
    assert len(painted) == len(SHADES) - 1
    assert distances == sorted(distances)
    assert all(contrast(luminance(letters), luminance(ground)) > 4.4 for letters, ground in painted)


@pytest.mark.parametrize(("said", "is_dark"), [("15;0", True), ("0;15", False), ("0;default;7", False), ("", True)])
def test_the_terminal_says_which_ground_it_has(gpt2: LM, monkeypatch, said: str, is_dark: bool) -> None:
    monkeypatch.setenv("COLORFGBG", said)
    shown = Text("a cat", gpt2).show(top=0)
    assert shown.ansi() == shown.ansi(is_dark=is_dark) != shown.ansi(is_dark=not is_dark)


def test_joins_are_marked(gpt2: LM) -> None:
    text = Text("it is not tr", gpt2) + "ue th" + "at it is"
    shown = text.show(top=0)
    assert [token.is_join_changed for token in shown.tokens if token.begins_segment] == [False, False, True]
    body, legend = shown.plain().rsplit("\n\n", 1)
    assert (body.count("¦"), body.count("≠")) == (2, 1)
    assert "changed tokens" in legend
    assert "changed tokens" not in Text("a", gpt2).show(top=0).plain()


def test_show_refuses(gpt2: LM) -> None:
    with pytest.raises(ValueError, match="top must be an int of at least 0, not -1"):
        Text("a", gpt2).show(top=-1)
    with pytest.raises(UnboundTextError):
        Text("a").show()


# Attention


def test_colours_of_attention_are_those_of_the_plain_model(gpt2: LM) -> None:
    text = Text("the refund", gpt2) + " is due on"
    shown = text.show(top=1, attention_from=-2, layers=1, heads=[0, 3])
    expected = plain_attention(MODEL, text.tokens)[1, [0, 3], -2].mean(dim=0)
    assert [token.attention for token in shown.tokens] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [idx for idx, token in enumerate(shown.tokens) if token.attends] == [len(text.tokens) - 2]
    body, legend = shown.plain().rsplit("\n\n", 1)
    assert legend.startswith("attention: █ ≥ 0.3  ▓ ≥ 0.1")
    assert "▸ the token that attends" in legend
    marks = [next(shade.mark for shade in ATTENTION.shades if token.attention >= shade.least) for token in shown.tokens]
    assert len(set(marks)) > 1
    drawn = zip(shown.tokens, marks, strict=True)
    starts = ["¦" if token.begins_segment else "▸" if token.attends else "" for token in shown.tokens]
    assert body == "".join(start + mark + token.string for start, (token, mark) in zip(starts, drawn, strict=True))
    assert [token.logprob for token in shown.tokens][1:] == text.token_logprobs.tolist()[1:]  # told as ever


def test_attention_in_html_and_in_terminals(gpt2: LM) -> None:
    shown = Text("the refund is due", gpt2).show(top=0, attention_from=-1)
    page = shown._repr_html_()
    assert html.unescape(page).count("attention: ") == len(shown.tokens) + 1  # each one's, and the legend
    assert page.count("border-bottom") == 1
    assert not re.search(r"(?<!-)color:", page)  # letters keep the page's colour
    assert f"rgba({ATTENTION.rgb}" in page
    for is_dark in (False, True):
        looks = {(s.letters_on_dark, s.on_dark) if is_dark else (16, s.on_light) for s in ATTENTION.shades}
        escapes = set(re.findall(r"\x1b\[(.*?)m", shown.ansi(is_dark=is_dark)))
        assert escapes <= {"0", *(f"38;5;{letters};48;5;{ground}" for letters, ground in looks)}


def test_attention_refuses(gpt2: LM) -> None:
    text = Text("the refund", gpt2)
    with pytest.raises(ValueError, match="need attention_from, the token that attends"):
        text.show(layers=0)
    assert gpt2.stats.tokens_computed == 0
    with pytest.raises(ValueError, match="attention_from must be ints from -"):
        text.show(attention_from=99)
    with pytest.raises(ValueError, match="attention_from must be ints, not 'last'"):
        text.show(attention_from="last")
    with pytest.raises(ValueError, match="layers must be ints from -2 to 1, not 2"):
        text.show(attention_from=-1, layers=2)


def test_a_heat_map_is_that_of_the_plain_model(gpt2: LM) -> None:
    text = Text("the $refund$", gpt2) + "\nis due"
    expected = plain_attention(MODEL, text.tokens)
    ax = plot_attention(text, 1, 2)
    assert ax.images[0].get_array().data == pytest.approx(expected[1, 2].numpy(), abs=1e-5)
    strings = [token.string.replace("\n", "↵") for token in text.show(top=0).tokens]
    assert [label.get_text() for label in ax.get_xticklabels()] == strings
    assert [label.get_text() for label in ax.get_yticklabels()] == strings
    ax.figure.canvas.draw()  # a $ is a $
    mpl.pyplot.close(ax.figure)
    _, own = mpl.pyplot.subplots()
    assert plot_attention(text, 0, rows=[-1], ax=own) is own
    assert own.images[0].get_array().data == pytest.approx(expected[0, :, -1:].mean(dim=0).numpy(), abs=1e-5)
    assert [label.get_text() for label in own.get_yticklabels()] == strings[-1:]
    mpl.pyplot.close(own.figure)


def test_a_heat_map_of_many_tokens_has_numbers(gpt2: LM) -> None:
    text = Text.from_tokens([idx % 50 for idx in range(100)], gpt2)
    ax = plot_attention(text, 0, 0, rows=slice(-3, None))
    assert ax.images[0].get_array().shape == (3, 100)
    assert len(ax.get_xticklabels()) < 20
    mpl.pyplot.close(ax.figure)


def test_bars_are_sorted_and_labelled() -> None:
    ax = plot_probabilities(np.array([0.2, 0.7, 0.1]), ["one", "two\n", "three"], top=2)
    assert [bar.get_width() for bar in ax.patches] == [0.7, 0.2]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["two↵", "one"]
    assert [text.get_text() for text in ax.texts] == ["70.0%", "20.0%"]
    assert ax.get_xlabel() == "probability, 1 more left out"
    again = plot_probabilities({"a": 0.5, "b": 0.5}, ax=ax)
    assert again is ax
    mpl.pyplot.close(ax.figure)


@pytest.mark.parametrize(
    ("probabilities", "completions", "message"),
    [
        ([[0.5, 0.5]], ["a", "b"], r"probabilities\[0\]"),
        ([0.5, 0.5], ["a"], "2 probabilities; give as many completions, not 1"),
        ([0.5, 0.5], None, "not none"),
        ([-0.7, -0.7], ["a", "b"], "between 0 and 1|that are finite"),
        ([0.5, float("nan")], ["a", "b"], "between 0 and 1|that are finite"),
        ({"a": 1.0}, ["a"], "leave `completions` out"),
    ],
)
def test_bars_refuse(probabilities, completions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_probabilities(probabilities, completions)


def test_without_matplotlib_the_error_says_what_to_install(gpt2: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_matplotlib(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MissingDependencyError, match=r"plot_probabilities needs matplotlib.*pip install matplotlib"):
        plot_probabilities([1.0], ["a"])
    before = gpt2.stats.tokens_requested
    with pytest.raises(MissingDependencyError, match=r"plot_attention needs matplotlib"):
        plot_attention(Text("a refund that nobody has computed", gpt2), 0)
    assert gpt2.stats.tokens_requested == before

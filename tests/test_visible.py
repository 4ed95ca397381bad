"""A text cannot command the terminal or the page that shows it, whatever it holds."""

import io
import json
import re
import unicodedata
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from rich.console import Console

import backprompt
from backprompt import LM, DrawingError, Text, plot_probabilities
from backprompt.inspection.missing import Miss
from backprompt.inspection.show import ShownText, ShownToken
from backprompt.visible import abbreviated, beginning, shortened, visible, visible_json, visible_lines
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

mpl.use("Agg")

SNIPPETS = [
    *(
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x1b]52;c;YQ==\x07",
        "\x1b]8;;http://a\x1b\\",
        "\x9b2J",
        "\x00",
        "\r",
        "\n",
        "\t",
        "\x7f",
    ),
    *("\u202e", "\u2066", "\u200b", "\u200d", "\ufe0f", "\ufeff", "\u2028", "\u061c", "\U000e0041", "\ufffe", "\u3164"),
    *("<script>alert(1)</script>", "<b>", "<BR/>", "<>", "</title>", "]]>", "<!--", "&", "&lt;", "&#60;", "&#92;N"),
    *(
        '"',
        "'",
        "\\",
        "\\N",
        "\\l",
        "\\G",
        "\\E",
        "\\\\",
        "%s",
        "{",
        "}",
        "|",
        "`",
        "$x^2$",
        "$\\frac$",
        "javascript:a()",
    ),
    *("a", " ", "word", "日本", "é", "👨‍👩‍👧", "می‌خواهم"),
]
HOSTILE = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=3), min_size=1, max_size=6).map("".join)
ENCODABLE = HOSTILE.filter(lambda text: not any(map(is_surrogate, text)))

COLOURS = re.compile(r"\x1b\[(0|38;5;\d+;48;5;\d+)m")


def is_surrogate(character: str) -> bool:
    return unicodedata.category(character) == "Cs"


def is_clean(shown: str) -> bool:
    """Whether there are no control characters but line breaks, nothing that turns directions, nothing unseen."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return all(c in "\n\u200c\u200d" or unicodedata.category(c) not in hidden for c in shown)


class Elements(HTMLParser):
    """The content of a page: the elements with their attributes' names, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[tuple[str, ...]] = set()
        self.text = ""
        self.titles: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add((tag, *(name for name, _ in attributes)))
        self.titles += [value for name, value in attributes if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def lm() -> LM:
    return LM(build("gpt2", vocab_size=1000), byte_level_bpe())


@given(HOSTILE)
def test_visible_strings(text):
    for shown in (visible(text), visible_lines(text), repr(Text(text)), repr(Text("a") + (Text(text) | text) + text)):
        assert is_clean(shown)
    assert "\n" not in visible(text)
    assert visible(visible(text)) == visible(text)


@given(HOSTILE, st.integers(4, 20), st.sampled_from(["...", '..."', "…"]))
def test_long_strings_say_that_something_is_left_out(string, limit, mark):
    cut = beginning(string, limit, end=mark)
    assert len(cut) <= limit
    assert cut == (string if len(string) <= limit else string[: limit - len(mark)] + mark)
    before, after = string[: (limit + 1) // 2], string[len(string) - limit // 2 :]
    assert shortened(string, limit, gap=mark) == (string if len(string) <= limit else f"{before}{mark}{after}")


@given(HOSTILE)
def test_what_was_given_is_shown_in_one_line(string):
    assert abbreviated(string).replace("…", "").isascii()
    assert max(map(len, (abbreviated(string * 99), abbreviated([string] * 99)))) <= 61


@given(ENCODABLE)
def test_json_means_the_same(text):
    written = visible_json(json.dumps({text: [text]}, ensure_ascii=False))
    assert is_clean(written)
    assert json.loads(written) == {text: [text]}


@pytest.mark.parametrize("text", ["日本語 é", "👨‍👩‍👧 ❤️‍🔥 1️⃣ 🇩🇪", "می‌خواهم", "क्‍ष", "\xa0 \u3000 𝒳 ̈"])  # noqa: RUF001
def test_what_writing_has_stays(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    "text", ["ad\u200dmin", "a\ufe0f", "\u200d", "é\u200d\u200d", "é\ufe0f\ufe0f", "日\U000e0100\U000e0101", "\u3164"]
)
def test_what_only_makes_equal_looking_strings_differ_is_shown(text):
    assert visible(text) != text


@given(HOSTILE)
def test_errors(text):
    for error in (DrawingError(f"It is {text}."), backprompt.ModelLoadError(f"{text}\n{text}")):
        assert is_clean(str(error))
    assert str(DrawingError("two\nlines")) == "two\nlines"


@settings(max_examples=25)
@given(ENCODABLE, ENCODABLE)
def test_show_explain_and_verify(lm, text, other):
    texts = [Text(text[:20], lm) + other[:20], Text(text[:20], lm) + "x", Text("the ", lm) + other[:20]]
    shown = texts[0].show(top=2)
    assert is_clean(COLOURS.sub("", shown.ansi()))
    assert is_clean(shown.plain())
    page = Elements(shown._repr_html_())
    assert page.tags <= {("div", "style"), ("span", "style"), ("span", "style", "title")}
    assert len(page.titles) == len(shown.tokens)
    assert is_clean(page.text + "".join(page.titles))
    for account in (backprompt.explain(texts, analyze=True), backprompt.verify(texts)):
        page = Elements(account._repr_html_())
        assert page.tags <= {(tag,) for tag in ("table", "thead", "tbody", "tr", "th", "td", "p", "br")}
        printed = io.StringIO()
        Console(file=printed, width=500).print(account)
        assert is_clean(str(account) + page.text + printed.getvalue())


@settings(max_examples=10)
@given(HOSTILE)
def test_what_a_store_says_of_itself(lm, text):
    miss = Miss(0, 0, text, 0, 1, 1, 1, "other model", f"the store has it under another dtype ({text}, not float32)")
    account = replace(backprompt.explain(Text("a", lm)), misses=(miss,))
    printed = io.StringIO()
    Console(file=printed, width=500).print(account)
    assert is_clean(str(account) + Elements(account._repr_html_()).text + printed.getvalue())


@given(HOSTILE)
def test_a_shown_token_of_any_string(string):
    """A tokenizer may decode to anything."""
    shown = ShownText([ShownToken(0, string, -1.0, ((string, -2.0),), True, True)])
    page = Elements(shown._repr_html_())
    assert page.tags <= {("div", "style"), ("span", "style"), ("span", "style", "title")}
    assert is_clean(COLOURS.sub("", shown.ansi()) + shown.plain() + page.text + page.titles[0])


SVG = "{http://www.w3.org/2000/svg}"
TITLE = "{http://www.w3.org/1999/xlink}title"


@settings(max_examples=25)
@given(HOSTILE, HOSTILE)
def test_pictures(text, other):
    """They hold what they show, to the letter, and no element or attribute that they would not have for other texts."""
    pytest.importorskip("pygraphviz")
    texts = [Text(text) + other + "x", Text(text) + "y", Text("z") + (Text(other) | text)]
    drawing = backprompt.draw(texts, max_characters=10_000)
    assert is_clean(drawing.source.replace("\t", ""))
    found = ElementTree.fromstring(drawing.pipe("svg"))
    plain = ElementTree.fromstring(
        backprompt.draw([Text("a") + "b" + "x", Text("a") + "y", Text("z") + (Text("b") | "a")]).pipe("svg")
    )
    assert kinds(found) <= kinds(plain)
    boxes = [node for node in found.iter(f"{SVG}g") if node.get("class") == "node"]
    tooltips = {node.get(TITLE) for box in boxes for node in box.iter() if node.get(TITLE)}
    labels = ["".join(node.text for node in box.iter(f"{SVG}text")).replace("\xa0", " ") for box in boxes]
    for segment in {text, other} - {""}:
        assert visible(segment).replace("\xa0", " ") in {tooltip.replace("\xa0", " ") for tooltip in tooltips}
        assert any(f"“{visible(segment)}”".replace("\xa0", " ") in label for label in labels)


def kinds(root: ElementTree.Element) -> set:
    """The elements that there are, each with the names of its attributes."""
    return {(node.tag, name) for node in root.iter() for name in ("", *node.attrib)}


@settings(max_examples=25)
@given(HOSTILE, HOSTILE)
def test_plots(text, other):
    names = [text, f"{other}-"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        axes = plot_probabilities([0.75, 0.25], names)
        axes.figure.canvas.draw()
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        assert is_clean(label.get_text())
        assert name not in SNIPPETS or label.get_text() == visible(name)
        assert not label.get_parse_math()
    pyplot.close(axes.figure)

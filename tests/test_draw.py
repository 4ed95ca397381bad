"""Pictures: what they say, that any string can be in them, and that they need no program beside Python's packages."""

import itertools
import json
import re
import stat
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import backprompt
from backprompt import LM, Drawing, DrawingError, Text, draw, evaluate, to_networkx
from backprompt.inspection.folding import Folding
from backprompt.inspection.frames import frames_of
from backprompt.inspection.graph import Status
from backprompt.inspection.looks import LOOKS, MEANINGS, Look, swatch
from backprompt.visible import shortened, visible, wrapped
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

MODEL = build("gpt2", vocab_size=1000)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def lm() -> LM:
    return LM(MODEL, byte_level_bpe())


@pytest.fixture(autouse=True)
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A path without a `dot`; the folder on it is empty."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def boxes(drawing: Drawing) -> list[list[str]]:
    """The lines of text in each box of the picture."""
    root = ET.fromstring(drawing.pipe("svg"))
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") == "node"]
    return [lines(group) for group in groups]


def lines(group: ET.Element) -> list[str]:
    """The strings at each height; runs of one line are several elements."""
    found: dict[str, str] = {}
    for text in group.iter(f"{SVG}text"):
        found[text.get("y")] = found.get(text.get("y"), "") + (text.text or "").replace("\xa0", " ")
    return list(found.values())


def said(drawing: Drawing) -> str:
    return "\n".join(lines(ET.fromstring(drawing.pipe("svg"))))


def rectangles(drawing: Drawing) -> dict[str, tuple[float, float, float, float]]:
    """Left, right, bottom and top of each box."""
    found = {}
    for node in json.loads(drawing.pipe("json"))["objects"]:
        if "pos" in node:
            x, y = map(float, node["pos"].split(","))
            half_width, half_height = 36 * float(node["width"]), 36 * float(node["height"])
            found[node["name"]] = (x - half_width, x + half_width, y - half_height, y + half_height)
    return found


def overlapping(drawing: Drawing) -> list[tuple[str, str]]:
    return [
        (one, other)
        for (one, (left, right, bottom, top)), (other, (left_2, right_2, bottom_2, top_2)) in itertools.combinations(
            rectangles(drawing).items(), 2
        )
        if left < right_2 and left_2 < right and bottom < top_2 and bottom_2 < top
    ]


def test_boxes_say_string_tokens_bytes_and_what_became_of_them(lm: LM) -> None:
    context = Text("Hello there.", lm)
    texts = [context + " Senator", context + " General"]
    num_tokens = len(context.tokens)
    evaluate(texts[0])
    evaluate(texts)
    num_bytes = num_tokens * lm.stats.bytes_held // lm.stats.tokens_computed
    found = {box[0]: box[1:] for box in boxes(draw(texts))}
    assert found["“Hello there.”"] == [
        f"{num_tokens} tokens · {num_bytes / 1000:.1f} kB",
        "in 2 texts",
        "reused from memory",
    ]
    assert found["“ Senator”"][-1] == "reused from memory"
    assert found["“ General”"][-1] == "computed now"
    assert found["“ General”"][0].startswith("6 tokens, 1 shared · ")
    assert "2 texts: 17 distinct tokens, 24 in all strings" in said(draw(texts))
    assert "computed now: by the latest evaluation" in said(draw(texts))
    assert "evicted" not in said(draw(texts))


def test_a_picture_computes_nothing(lm: LM) -> None:
    text = Text("Hello", lm) + " there"
    evaluate(text)
    longer = text + "."
    before = lm.stats
    assert "not evaluated" in said(longer.draw())
    assert lm.stats == before


def test_statuses_differ_without_colour() -> None:
    borders = [(LOOKS[status].style, LOOKS[status].width, LOOKS[status].lines) for status in MEANINGS]
    assert len(set(borders)) == len(borders)


@settings(max_examples=60)
@given(st.text(st.characters(), min_size=1, max_size=60))
@example("\\N \\G \\E \\L \\n \\\\ \\")
@example('"<b>&amp;</b>" <br/> {a|b} </table>')
@example("\x00\x1b[0m\r\n\t\x7f\u2028\ud800\ufffe\u202e")
@example(" ")
@example("שלום 東京 é\u0301 👩‍👩‍👧")
def test_any_string_can_be_read_in_its_box(string: str) -> None:
    (box,) = boxes(draw(Text(string), max_characters=60))
    assert "".join(box) == f"“{visible(string)}”".replace("\xa0", " ")


@given(st.text(max_size=200), st.integers(2, 50))
def test_long_strings_lose_their_middle(string: str, limit: int) -> None:
    short = shortened(string, limit)
    assert len(short) <= max(limit + 1, 2)
    if short != string:
        assert len(string) > limit
        before, after = short[: (limit + 1) // 2], short[(limit + 1) // 2 + 1 :]
        assert string.startswith(before)
        assert string.endswith(after)
        assert len(before) + len(after) == limit
    assert "".join(wrapped(string)) == string


def test_repeated_leaves_fold(lm: LM) -> None:
    texts = [Text("Prompt: ", lm) + f"leaf number {n}" for n in range(75)]
    evaluate(texts)
    found = boxes(draw(texts))
    assert len(found) == 1 + 6
    assert found[-1][:2] == ["… 70 more", "70 texts"]
    assert sum(int(re.search(r"(\d+) tokens", " ".join(box))[1]) for box in found) >= lm.stats.tokens_computed
    num_shown = sum(data["num_own_tokens"] for _, data in to_networkx(texts[:5]).nodes(data=True))
    assert found[-1][2].startswith(f"{lm.stats.tokens_computed - num_shown} tokens")
    assert len(boxes(draw(texts, max_children=75))) == 76
    unshared = boxes(draw([Text(f"{n}", lm) for n in range(9)], max_children=3))
    assert [box[0] for box in unshared] == ["“0”", "“1”", "… 7 more"]


def test_folded_subtrees_take_along_what_follows_them(lm: LM) -> None:
    texts = [Text("I", lm) + f"{shot}?" + label for shot in range(10) for label in (" yes", " no")]
    found = boxes(draw(texts, max_children=2))
    assert sorted(box[0] for box in found) == sorted(["“I”", "“0?”", "“ yes”", "“ no”", "… 9 more"])
    (fold,) = (box for box in found if box[0] == "… 9 more")
    assert fold[1] == "18 texts"


def document_texts(lm: LM, num_questions: int) -> list[Text]:
    docs = backprompt.parallel([Text(f"doc {i}", lm).frozen() for i in range(3)])
    return [Text("sys ", lm) + f"Q{k}? " + docs + " A:" + a for k in range(num_questions) for a in ("yes", "no")]


def subset_texts(lm: LM, num_questions: int) -> list[Text]:
    shots = [Text(f"shot {i}. ", lm) for i in range(12)]
    chosen = list(itertools.combinations(range(12), 3))
    return [
        Text("sys ", lm) + backprompt.parallel([shots[i] for i in chosen[k]]) + f"Q{k}?" for k in range(num_questions)
    ]


def nested_texts(lm: LM, num_questions: int) -> list[Text]:
    document = (Text("doc ", lm) + (Text("a", lm) | "b") + "c").frozen()
    return [
        Text(f"Q{k} ", lm) + (document | ((Text("x", lm) | f"y{k}") + "z") | f"own {k}") + "end"
        for k in range(num_questions)
    ]


@pytest.mark.parametrize("texts", [document_texts, subset_texts, nested_texts])
def test_no_more_boxes_for_more_texts(lm: LM, texts: Callable[[LM, int], list[Text]]) -> None:
    few, many = draw(texts(lm, 20)), draw(texts(lm, 100))
    assert len(boxes(few)) == len(boxes(many)) < 60
    assert overlapping(many) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_node_is_in_one_box_and_frames_are_within_each_other_or_apart(data: st.DataObject) -> None:
    def joined(pieces: st.SearchStrategy[Text]) -> st.SearchStrategy[Text]:
        return st.lists(pieces, min_size=1, max_size=3).map(lambda some: sum(some[1:], some[0]))

    def side_by_side_or_frozen(pieces: st.SearchStrategy[Text]) -> st.SearchStrategy[Text]:
        groups = st.lists(joined(pieces), min_size=2, max_size=3).map(backprompt.parallel)
        return groups | joined(pieces).map(Text.frozen)

    pieces = st.recursive(st.sampled_from("abcd").map(Text), side_by_side_or_frozen, max_leaves=12)
    graph = to_networkx(data.draw(st.lists(joined(pieces), min_size=1, max_size=8)))
    folding = Folding(graph, data.draw(st.integers(2, 3)))
    assert sorted(node for box in folding.boxes.values() for node in box.nodes) == sorted(graph)
    assert all(node in folding.boxes[name].nodes for node, name in folding.of.items())
    for one, other in itertools.combinations(frames_of(graph), 2):
        assert one.nodes < other.nodes or other.nodes < one.nodes or not one.nodes & other.nodes


def test_long_rows_fold_but_for_the_first(lm: LM) -> None:
    text = sum((Text(f"shot {n}\n", lm) for n in range(1, 8)), Text("instruction ", lm))
    found = boxes(draw([text + "a", text + "b"]))
    assert [box[0] for box in found] == ["“instruction ”", "… 7 more segments", "“a”", "“b”"]
    assert len(boxes(draw(Text("a") + "b" + "c" + "d"))) == 4


def test_groups_are_framed_and_stand_side_by_side(lm: LM) -> None:
    nested = Text("x", lm) + (Text("y", lm) | "z")
    root = ET.fromstring(draw(Text("context ", lm) + (Text("one", lm) | nested) + "end").pipe("svg"))
    frames = [group for group in root.iter(f"{SVG}g") if group.get("class") == "cluster"]
    assert [lines(frame) for frame in frames] == [["side by side: none sees the others"]] * 2
    text = Text("context ", lm) + (Text("one", lm) | "two" | "three") + "end"
    drawing = draw(text)
    names = {data["string"]: str(node) for node, data in to_networkx(text).nodes(data=True)}
    place = rectangles(drawing)
    tops = [place[names[branch]][3] for branch in ("one", "two", "three")]
    assert tops == sorted(tops, reverse=True)  # in written order, each below the one before
    assert all(place[names[b]][1] < place[names["end"]][0] for b in ("one", "two", "three"))
    assert "a group ends: what follows sees all of its branches" in said(drawing)
    assert "2 times" in said(draw(Text("c ", lm) + (Text("a", lm) | "a" | "b") + "end"))


def test_a_branch_that_groups_share_does_not_make_them_one_frame(lm: LM) -> None:
    document = Text("doc", lm).frozen()
    texts = [Text(f"Q{k} ", lm) + (document | f"own {k}") + "end" for k in range(3)]
    root = ET.fromstring(draw(texts).pipe("svg"))
    frames = [lines(group) for group in root.iter(f"{SVG}g") if group.get("class") == "cluster"]
    assert frames == [["side by side: none sees the others"]]
    graph = to_networkx(texts)
    (frame,) = frames_of(graph)
    assert {graph.nodes[node]["string"] for node in frame.nodes} == {"doc", "own 0"}


def test_a_branch_that_stands_twice_in_a_group_is_side_by_side_with_itself() -> None:
    assert "side by side" in said(draw(Text("c ") + (Text("a") | "a") + "end"))
    assert "sees nothing before it" in said(draw(Text("c ") + (Text("a") + "b").frozen() + "end"))


def luminance(colour: str) -> float:
    """As of WCAG 2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("look", LOOKS.values())
def test_borders_show_on_white_and_on_black(look: Look) -> None:
    border, black = luminance(look.border), luminance("#0d1117")
    assert 1.05 / (border + 0.05) > 3.5
    assert (border + 0.05) / (black + 0.05) > 3.5


@pytest.mark.parametrize("status", MEANINGS)
def test_the_legend_has_as_many_lines_as_the_box_and_the_inner_one_is_filled(status: Status) -> None:
    look, drawn = LOOKS[status], swatch(status)
    assert drawn.count(look.border) == look.lines
    assert drawn.index(look.fill) > drawn.rindex(look.border)


def test_lines_are_cut_behind_spaces_and_line_ends() -> None:
    assert list(wrapped("“one two↵three four”", 12)) == ["“one two↵", "three four”"]
    assert list(wrapped("“one two three↵”", 14)) == ["“one two ", "three↵”"]
    assert max(len(line) for box in boxes(draw(Text("word " * 20), max_characters=30)) for line in box) <= 15


def test_joins_that_split_tokens_from_those_of_other_texts_are_marked(lm: LM) -> None:
    beginning = Text("it is not tr", lm) + "ue th"
    text = beginning + "at it is"
    assert len(text.joins()) == 1
    for drawn in (draw([text, beginning]), draw([text, beginning + " but"])):
        assert said(drawn).count("≠") == 2  # in the box behind the join, and in the legend
        assert any("≠ at its join" in box for box in boxes(drawn))
    for unmarked in ([text], [text, beginning + "at"], [Text("a", lm) + " b"]):  # nobody has the tokens that changed
        assert "≠" not in said(draw(unmarked))


def test_a_deep_tree_with_a_branch_a_turn_stays_under_two_screens() -> None:
    """Each turn has a reply that was dropped, and one that the conversation goes on behind."""
    text, texts = Text("You are a helpful assistant."), []
    for turn in range(40):
        text += f"User: another question, number {turn}?\n"
        texts.append(text + f"Assistant: a reply {turn} that was dropped\n")
        text += f"Assistant: a reply {turn} that was kept\n"
    drawing = draw([*texts, text])
    (points,) = re.findall(r'<svg width="(\d+)pt"', drawing.pipe("svg", encoding="utf-8"))
    assert int(points) * 4 / 3 < 2 * 1920  # pixels
    num_shown = len(boxes(drawing)) - 1
    assert any(f"{121 - num_shown} more segments" in line for box in boxes(drawing) for line in box)
    assert len(boxes(draw([*texts, text], max_columns=1000))) == 121


def test_a_generated_text_says_so_and_why_it_ends(lm: LM) -> None:
    texts = Text("it is", lm).generate(max_new_tokens=3, n=2, do_sample=True, seed=1)
    drawn = [box for box in boxes(draw(texts)) if "generated: length" in box]
    assert len(drawn) == 2
    assert not any("generated" in line for box in boxes(draw([text.prompt for text in texts])) for line in box)


@pytest.mark.parametrize("num_branches", [2, 7])
def test_nothing_overlaps(lm: LM, num_branches: int) -> None:
    shots = [Text(f"Q: What is {n} + {n}? A: {2 * n}\n", lm) for n in range(num_branches)]
    group = backprompt.parallel([*shots[1:], shots[0].frozen(), shots[0] + (shots[1] | "y") + "z"])
    texts = [
        Text("Instruction.\n", lm) + group + f"Question {n}" + label for n in range(9) for label in ("a", "東京" * 9)
    ]
    evaluate(texts[:4])
    drawing = draw([*texts, Text("alone", lm), Text("", lm)])
    assert len(rectangles(drawing)) > 10
    assert overlapping(drawing) == []


def test_renders_files_and_shows_itself_in_notebooks(tmp_path: Path) -> None:
    drawing = (Text("a") + "b").draw()
    assert drawing.render(tmp_path / "tree", format="svg") == str(tmp_path / "tree.svg")
    assert (tmp_path / "tree").read_text(encoding="utf-8") == drawing.source
    assert drawing.render(tmp_path / "new" / "alone.png") == str(tmp_path / "new" / "alone.png")
    assert (tmp_path / "new" / "alone.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["alone.png"]
    assert drawing.render(outfile=tmp_path / "x.pdf") == str(tmp_path / "x.pdf")
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    (mimetype, svg), *_ = drawing._repr_mimebundle_().items()
    assert mimetype == "image/svg+xml"
    assert "“a”" in svg
    drawing.node("added", "by hand")
    assert "by hand" in said(drawing)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_unknown_formats_are_refused() -> None:
    with pytest.raises(DrawingError, match="cannot draw this as 'nope'"):
        Text("a").draw().pipe("nope")


def test_without_pygraphviz_a_dot_on_the_path_serves(monkeypatch: pytest.MonkeyPatch, no_programs: Path) -> None:
    monkeypatch.setitem(sys.modules, "pygraphviz", None)
    with pytest.raises(DrawingError, match="pip install pygraphviz"):
        Text("a").draw().pipe("svg")
    dot = no_programs / "dot"
    dot.write_text(f"#!{sys.executable}\nimport sys; print('drawn by dot', sys.argv[1:])\n")
    dot.chmod(dot.stat().st_mode | stat.S_IXUSR)
    assert Text("a").draw().pipe("svg") == b"drawn by dot ['-Kdot', '-Tsvg']\n"


def test_a_library_that_pygraphviz_misses_is_named(monkeypatch: pytest.MonkeyPatch, no_programs: Path) -> None:
    (no_programs / "pygraphviz.py").write_text("raise ImportError('libgobject-2.0.so.0: cannot open')")
    monkeypatch.delitem(sys.modules, "pygraphviz", raising=False)
    monkeypatch.syspath_prepend(no_programs)
    with pytest.raises(DrawingError, match=r"cannot be loaded \(libgobject-2.0.so.0: cannot open\)"):
        Text("a").draw().pipe("svg")


def test_nothing_to_draw_and_bad_numbers() -> None:
    assert "nothing to draw" in said(draw([]))
    assert "nothing to draw" in said(Text("").draw())
    for options in ({"max_children": 1}, {"max_characters": True}, {"max_children": 2.5}):
        with pytest.raises(ValueError, match="must be an int of at least 2"):
            draw(Text("a"), **options)

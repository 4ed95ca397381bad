"""The pages in docs/: every block of Python runs, in the order of its page, and prints what stands behind it.

```python          runs; the blocks of a page share their names
```output          what the block before it printed, to the letter; a block without one may print what it likes
<!-- not run: why --> on the line before a block leaves it out
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import backprompt
from draw_pictures import DRAWN, OUTPUTS, PICTURES, PRINTED
from tiny_tokenizers import MAX_VOCAB_SIZE, byte_level_bpe

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?^```python\n(.*?)^```$(?:\n^```output\n(.*?)^```$)?", re.DOTALL | re.M)
MODELS = ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Block:
    code: str
    output: str | None
    is_run: bool


def blocks_of(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert text.count("```python\n") == len(found), "a block that is not understood"
    assert text.count("```output\n") == sum(bool(output) for _, _, output in found), "an output without its block"
    return [Block(code, output or None, not not_run) for not_run, code, output in found]


@pytest.fixture(scope="module")
def folder_of_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `load` finds the pages' models by name: tiny ones, with 512 positions."""
    folder = tmp_path_factory.mktemp("models")
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
    for name in MODELS:
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def in_folder_of_models(folder_of_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODELS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder_of_models / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    logger = logging.getLogger("backprompt")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("in_folder_of_models", "logging_as_before")
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.is_run for block in blocks_of(page))])
def test_blocks_run_and_print_what_the_page_says(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {"__name__": "__main__"}
    for block in blocks_of(page):
        if not block.is_run:
            compile(block.code, page, "exec")
            continue
        exec(compile(block.code, page, "exec"), names)
        printed = capsys.readouterr().out
        if block.output is not None:
            assert printed == block.output, block.code


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
def test_pictures_show_what_their_pages_tell(name: str, folder_of_models: Path) -> None:
    drawn = DRAWN[name](lambda **options: backprompt.load(folder_of_models / "gpt2", **options))
    source = drawn.source.replace("&#160;", " ")
    statuses = {"computed now", "reused from memory", "from disk", "evicted", "not evaluated"}
    assert {status for status in statuses if status in source} == SHOWN[name]
    committed = (PICTURES / f"{name}.svg").read_text(encoding="utf-8").replace("&#160;", " ").replace("\xa0", " ")
    assert {status for status in statuses if status in committed} == SHOWN[name]
    assert any(f"pictures/{name}.svg" in (DOCS / page).read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("name", PRINTED)
def test_printed_accounts_are_of_the_same_form(name: str, folder_of_models: Path) -> None:
    """The committed ones are of the demo model: other numbers, the same lines of text."""
    printed = str(PRINTED[name](lambda **options: backprompt.load(folder_of_models / "gpt2", **options)))
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

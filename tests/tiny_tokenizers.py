"""Small tokenizers of five kinds, trained on the lines below; all ids are below MAX_VOCAB_SIZE.

Training has no chance in it, so a name means the same tokenizer in every process. Each call builds a new
object: a test may change one without another noticing.

    byte_level_bpe      GPT-2      adds no special token
    llama3_bpe          Llama 3    puts <|begin_of_text|> in front
    sentencepiece_bpe   Llama 2    puts <s> and a dummy space in front; unknown characters become bytes
    unigram             T5         a dummy space in front, </s> at the end; unknown characters become <unk>
    word_piece          BERT       a space before each word; upper case and unknown words become [UNK]
"""

import json
import math
from collections.abc import Callable
from functools import cache

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

MAX_VOCAB_SIZE = 320

TRAINING_LINES = [
    "The cat sat on the mat, and the other cat didn't.",
    "They're sure it's theirs; we'll see what we've got, I'd say.",
    "Question: What is 12 + 34?  Answer: 46.\n",
    "Review: the film was great, the ending wasn't.\nLabel: positive\n\n",
    "In 2024 there were 1,234,567 of them (about 3.14%).",
    "Hello there. General Kenobi! You are a bold one...",
    "  two  spaces,   three, and\ttabs\r\n\r\n",
    "def f(x):\n    return x ** 2  # the square\n",
    "Café, naïve, über, señor; cafe\u0301 with a combining accent.",
    "Family \U0001f468\u200d\U0001f469\u200d\U0001f467 and more family \U0001f469\u200d\U0001f467.",
    "Thumbs up \U0001f44d\U0001f3fd \U0001f44d, flags \U0001f1eb\U0001f1f7 \U0001f1ef\U0001f1f5.",
    "東京は日本の首都です。北京是中国的首都。",
]

# https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py, `pat_str`
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2: bytes, split by GPT-2's pattern, nothing added."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe_json()),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def llama3_bpe() -> PreTrainedTokenizerFast:
    """As Llama 3: bytes, split by Llama 3's pattern, <|begin_of_text|> in front."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_llama3_bpe_json()),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        clean_up_tokenization_spaces=False,
    )


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2: BPE over the whole string with spaces as "▁", <s> in front, unknown characters as bytes."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_sentencepiece_bpe_json()),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def unigram() -> PreTrainedTokenizerFast:
    """As T5: the likeliest split of each word, </s> at the end.

    Not every string reads back: unknown characters are lost, and " a" has the ids of "a".
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_unigram_json()),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: the longest pieces of each word; the spaces between words are not written as tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_word_piece_json()),
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level_bpe": byte_level_bpe,
    "llama3_bpe": llama3_bpe,
    "sentencepiece_bpe": sentencepiece_bpe,
    "unigram": unigram,
}


@cache
def _byte_level_bpe_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    _train_on_bytes(tokenizer, special_tokens=["<|endoftext|>"])
    return tokenizer.to_str()


@cache
def _llama3_bpe_json() -> str:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train_on_bytes(tokenizer, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
            ),
        ]
    )
    return tokenizer.to_str()


def _train_on_bytes(tokenizer: Tokenizer, special_tokens: list[str]) -> None:
    """Train in place: the special tokens, all 256 bytes, then merges up to MAX_VOCAB_SIZE."""
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)


# Characters with pieces in sentencepiece_bpe. Every other character, newlines and capitals too, becomes bytes.
_SENTENCEPIECE_ALPHABET = sorted("▁abcdefghilmnoprstuvwy.,':é東")


@cache
def _sentencepiece_bpe_json() -> str:
    special_tokens = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    fixed_tokens = [*special_tokens, *byte_tokens, *_SENTENCEPIECE_ALPHABET]
    num_merges = MAX_VOCAB_SIZE - len(fixed_tokens)
    # Two spaces come first, as in Llama 2: the one token whose spaces may stand on both sides of a `+`.
    merges = [("▁", "▁"), *_learned_merges(_SENTENCEPIECE_ALPHABET, num_merges - 1)]
    merged_tokens = dict.fromkeys(left + right for left, right in merges)  # two merges may give one token
    vocabulary = {token: token_id for token_id, token in enumerate([*fixed_tokens, *merged_tokens])}

    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer.to_str()


@cache
def _unigram_json() -> str:
    special_tokens = ["<pad>", "</s>", "<unk>"]
    pieces = [
        *((token, 0.0) for token in special_tokens),
        *_scored_pieces(MAX_VOCAB_SIZE - len(special_tokens)),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special_tokens.index("<unk>")))
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special_tokens.index("</s>"))]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer.to_str()


@cache
def _word_piece_json() -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(
        vocab_size=MAX_VOCAB_SIZE, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    return tokenizer.to_str()


def _scored_pieces(num_pieces: int) -> list[tuple[str, float]]:
    """The characters of the training lines and what BPE learns over them, each with its log-probability.

    Counted rather than learned by UnigramTrainer, which orders pieces of one score by chance.
    """
    words = [word for line in TRAINING_LINES for word, _ in pre_tokenizers.Metaspace().pre_tokenize_str(line)]
    alphabet = sorted(set("".join(words)))
    merges = _learned_merges(alphabet, num_merges=num_pieces - len(alphabet))
    pieces = [*alphabet, *dict.fromkeys(left + right for left, right in merges)]
    counts = [sum(word.count(piece) for word in words) for piece in pieces]
    return [(piece, math.log(count / sum(counts))) for piece, count in zip(pieces, counts, strict=True)]


def _learned_merges(alphabet: list[str], num_merges: int) -> list[tuple[str, str]]:
    """The first merges that BPE learns over the alphabet; as in SentencePiece, "▁" only starts a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + num_merges,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_LINES, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]

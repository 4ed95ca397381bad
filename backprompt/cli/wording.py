"""The library's errors in the words of the command line: options in place of keywords and calls."""

from __future__ import annotations

import re

_OPTIONS = {
    "memory_bytes": "--memory",
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("discount_completions", "neutral_prompt", "end_of_prompt", "prior", "aggregate"),
            *("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "n", "stop", "include_stop", "seed"),
            *("model", "device", "dtype", "store", "joins", "pack_weights"),
            *("max_children", "max_columns", "sample", "tolerance"),
        )
    },
}

_PHRASES = {
    "normalize=False": "--no-normalize",
    "set `do_sample=False`": "leave out --do-sample",
    "do_sample is False": "--option do_sample is false",
    'joins="exact" or "split"': "--joins exact or --joins split",
    "verify(texts, tolerance=...), in nats": "--tolerance NATS",
    "LM(..., memory_bytes=...)": "--memory SIZE",
    "with LM(..., beyond_trained_length=True)": "in Python, with LM(..., beyond_trained_length=True)",
    "pass the path of its folder: backprompt.load('path/to/model')": "give the path of its folder: --model FOLDER",
    "max_new_tokens, stop, include_stop, seed, constraint and the fields": "--max-new-tokens, --stop, --include-stop, "
    "--seed, --regex, --json-schema, and with --option the fields",
    "(num_beams=...)": "(--option num_beams=N)",
    "(prompt_lookup_num_tokens=...)": "(--option prompt_lookup_num_tokens=N)",
    "Add a string to it, or start it with a token such as the tokenizer's BOS: "
    "Text.from_tokens([tokenizer.bos_token_id], lm).": "Give it words.",
    "prompts[0]": "the prompt",
}

_KEYWORD = re.compile(
    "|".join(
        [
            "(?P<phrase>" + "|".join(map(re.escape, _PHRASES)) + ")",
            r"\bcompletions\[(?P<idx>\d+)\]",
            rf"\b(?P<given>{'|'.join(_OPTIONS)})=(?P<value>\.\.\.|[\"']?[\w.-]+[\"']?)",
            r"\b(?P<other>num_beams)=(?P<number>\d+)",
            # A word with _ is a keyword anywhere, another word only if marked, or at the beginning of the message.
            rf"(?P<quote>`?)\b(?P<name>{'|'.join(name for name in _OPTIONS if '_' in name)})\b(?P=quote)",
            rf"`(?P<marked>{'|'.join(_OPTIONS)})`",
            rf"^(?P<first>{'|'.join(_OPTIONS)})(?= (must|has|have|is|takes)\b)",
            r"(?<![\w=])(?P<mark>[\"'])(\\.|(?!(?P=mark)).)*(?P=mark)",  # quoted text stays as it is
        ]
    )
)


def in_options(message: str) -> str:
    """Return a message of the library with options in place of keywords, such as `--no-normalize`."""
    return _KEYWORD.sub(_worded, message)


def _worded(found: re.Match[str]) -> str:
    if phrase := found["phrase"]:
        return _PHRASES[phrase]
    if found["idx"]:
        return f"completion {int(found['idx']) + 1} of --completions"
    if found["other"]:
        return f"--option {found[0]}"
    if name := found["given"]:
        value = found["value"].strip("\"'")
        return _OPTIONS[name] if value in ("...", "True") else f"{_OPTIONS[name]} {value}"
    if name := found["name"] or found["marked"] or found["first"]:
        return _OPTIONS[name]
    return found[0]

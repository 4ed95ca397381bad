"""Records what CAPPr 0.9.6 gives for the tiny models of the tests: numbers.json beside this file.

CAPPr needs older versions than backprompt, so this runs in two environments, from the top of the repository:

    .venv/bin/python tests/cappr/record.py models FOLDER       saves the models and tokenizers of the tests
    python3 -m venv cappr; cappr/bin/pip install torch transformers==4.49.0 cappr==0.9.6 'numpy<2'
    cappr/bin/python tests/cappr/record.py numbers FOLDER      writes numbers.json
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROMPTS = ["The cat sat on the", "General Kenobi, who was there, says", "Question: What is 12 + 34? Answer:"]
COMPLETIONS = ["mat", "mat and the cat", "46", "hello there"]
PRIOR = [0.1, 0.2, 0.3, 0.4]
CASES = {"gpt2 byte-level": ("gpt2", "byte_level_bpe"), "llama sentencepiece": ("llama", "sentencepiece_bpe")}


def save_models(folder: Path) -> None:
    """In backprompt's environment."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
    import tiny_tokenizers
    from tiny_models import FAMILIES

    for name, (family, tokenizer) in CASES.items():
        FAMILIES[family]().save_pretrained(folder / name)
        made = getattr(tiny_tokenizers, tokenizer)()
        made.backend_tokenizer.save(str(folder / name / "tokenizer.json"))
        special = {key: str(value) for key, value in made.special_tokens_map.items() if isinstance(value, str)}
        (folder / name / "special.json").write_text(json.dumps(special))


def record(folder: Path) -> None:
    """In CAPPr's environment."""
    import cappr
    from cappr import Example
    from cappr.huggingface import classify
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    assert cappr.__version__ == "0.9.6"
    numbers = {}
    for name in CASES:
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        special = json.loads((folder / name / "special.json").read_text())
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / name / "tokenizer.json"),
            model_input_names=["input_ids", "attention_mask"],
            **special,
        )
        pair = (model, tokenizer)
        examples = [Example(PROMPTS[0], COMPLETIONS[:2], prior=[0.3, 0.7]), Example(PROMPTS[1], COMPLETIONS[1:])]
        numbers[name] = {
            "log_probs": classify.log_probs_conditional(PROMPTS, COMPLETIONS, pair),
            "predict_proba": classify.predict_proba(PROMPTS, COMPLETIONS, pair).tolist(),
            "prior": classify.predict_proba(PROMPTS, COMPLETIONS, pair, prior=PRIOR).tolist(),
            "not normalized": classify.predict_proba(PROMPTS, COMPLETIONS, pair, normalize=False).tolist(),
            "no space": classify.predict_proba(PROMPTS, COMPLETIONS, pair, end_of_prompt="").tolist(),
            "discounted": classify.predict_proba(PROMPTS, COMPLETIONS, pair, discount_completions=-0.5).tolist(),
            "examples": [row.tolist() for row in classify.predict_proba_examples(examples, pair)],
            "predict": classify.predict(PROMPTS, COMPLETIONS, pair),
        }
    (HERE / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    {"models": save_models, "numbers": record}[sys.argv[1]](Path(sys.argv[2]))

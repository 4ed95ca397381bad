"""What `make package` runs in a fresh environment: the installed package computes the plain model's numbers.

Models are made here, so nothing is downloaded.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import backprompt

assert "site-packages" in backprompt.__file__, f"{backprompt.__file__} is not the installed package"

words = ["<unk>", "Hello", "there", "General", "Senator"]
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
).eval()

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    lm = backprompt.load(folder)
    context = backprompt.Text("Hello there", lm)
    texts = [context + name for name in (" Senator", " General")]
    backprompt.evaluate(texts)
    assert lm.stats.tokens_computed == 4, lm.stats
    with torch.inference_mode():
        for text in texts:
            plain = model(torch.tensor([text.tokens])).logits[0, -1]
            torch.testing.assert_close(text.logits, plain, rtol=1e-5, atol=1e-5)

    prompts = Path(folder, "prompts.jsonl")
    prompts.write_text('{"prompt": "Hello there"}\n', encoding="utf-8")
    completions = Path(folder, "completions.txt")
    completions.write_text("Senator\nGeneral\n", encoding="utf-8")
    command = ["backprompt", "score", str(prompts), "--model", folder, "--completions", str(completions)]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="")

print(f"backprompt {backprompt.__version__} works as installed on Python {sys.version.split()[0]}.")

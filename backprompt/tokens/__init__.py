"""From texts to token ids: the tokenizer's private copy, joins, special tokens, and encoded texts with groups.

The folder may import texts. It imports no spans and no model.
A new rule of joining goes into `encoder.py`, a new family of tokenizers into `tokenizer.py`.
"""

"""The slow reference that is here to stay: the plain call, one text at a time.

No cache, no batch, no packing: what transformers answers to `model(tokenizer(string))`, which is what the
library promises. Nothing here may use the library.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How far logits may lie from the plain call's, by the dtype the model computes in. The same products are
# summed in another order, which moves the last bits in every layer. The largest gap seen over FAMILIES is 9e-6 in
# float32, where logits reach 10; a dtype that is not here has not been measured.
ATOL: dict[torch.dtype, float] = {torch.float32: 5e-5}


def plain_ids(tokenizer: PreTrainedTokenizerBase, string: str) -> list[int]:
    """The token ids of the whole string, with the special tokens that the tokenizer adds."""
    return tokenizer(string)["input_ids"]


def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The logits after each of the ids, (tokens, vocab), in the model's dtype and on its device."""
    with _evaluating(model), torch.no_grad():
        return model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0]


def plain_token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """The log-probability of each id after those before it, (tokens,), nats, float32; nan for the first."""
    logprobs = plain_logits(model, ids)[:-1].float().log_softmax(dim=-1)  # (tokens - 1, vocab)
    next_ids = torch.tensor(list(ids)[1:], dtype=torch.long, device=logprobs.device)
    following = logprobs.gather(1, next_ids[:, None])[:, 0]  # (tokens - 1,)
    return torch.cat([following.new_full((1,), float("nan")), following])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training:
            module.training = was_training

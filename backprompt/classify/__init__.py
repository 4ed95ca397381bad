"""Classification by completion probability: the most probable of given completions behind a prompt.

The start of a completion is a hard boundary. Each completion is encoded by itself, and its token ids follow those of
the prompt, so no token spans the boundary.

Names and options are those of CAPPr (Dubey, https://github.com/kddubey/cappr). With `end_of_prompt=" "`, CAPPr's
default, the numbers are also the same.

Modules of this folder may import texts and `LM`s, except `weighing.py`, `search.py` and `calibration.py`.
A new correction of probabilities goes into `weighing.py`, a new search into a module beside `search.py`.
"""

from backprompt.classify.calibration import best_threshold, calibrate
from backprompt.classify.completions import EndOfPrompt
from backprompt.classify.language import probability_of
from backprompt.classify.prediction import STRATEGIES, Strategy, predict, predict_proba
from backprompt.classify.prompts import Example, Prompt, Prompts
from backprompt.classify.scoring import log_probs, token_logprobs
from backprompt.classify.weighing import AGGREGATES, Aggregate

__all__ = [
    "AGGREGATES",
    "STRATEGIES",
    "Aggregate",
    "EndOfPrompt",
    "Example",
    "Prompt",
    "Prompts",
    "Strategy",
    "best_threshold",
    "calibrate",
    "log_probs",
    "predict",
    "predict_proba",
    "probability_of",
    "token_logprobs",
]

"""Types that users' checkers see; never run, but checked by test_types.py."""

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import backprompt as bp
from backprompt.classify import Example, predict, predict_proba
from backprompt.text.engine import Representation


def generated(lm: bp.LM, text: bp.Text) -> None:
    assert_type(text.generate(max_new_tokens=3), bp.GeneratedText)
    assert_type(text.generate(max_new_tokens=3, n=2, do_sample=True), list[bp.GeneratedText])
    assert_type(text.select(["yes", "no"]), bp.SelectedText)
    assert_type(bp.generate(text, max_new_tokens=3), bp.GeneratedText)
    assert_type(bp.generate(text, max_new_tokens=3, n=2, temperature=0.7), list[bp.GeneratedText])
    assert_type(bp.generate([text, text], max_new_tokens=3), list[bp.GeneratedText])
    assert_type(bp.generate([text, text], max_new_tokens=3, n=2, temperature=0.7), list[list[bp.GeneratedText]])
    text.generate()  # type: ignore[call-overload]
    text.generate(max_new_tokens="3")  # type: ignore[call-overload]


def evaluated(lm: bp.LM, text: bp.Text) -> None:
    assert_type(bp.load("gpt2", device_map="auto"), bp.LM)
    assert_type(bp.evaluate(text), bp.ModelRepr)
    assert_type(bp.evaluate([text]), list[bp.ModelRepr])
    assert_type(text.model_repr, Representation)
    assert_type(text + " and more", bp.Text)


def classified(lm: bp.LM, text: bp.Text, example: Example) -> None:
    assert_type(predict_proba("Sky", ["blue", "red"], lm), npt.NDArray[np.float64])
    assert_type(predict_proba(text, ["blue", "red"], prior=[0.5, 0.5]), npt.NDArray[np.float64])
    assert_type(predict_proba([text, text], ["blue", "red"]), npt.NDArray[np.float64])
    assert_type(predict_proba(["Sky", "Sea"], ["blue", "red"], lm), npt.NDArray[np.float64])
    assert_type(predict_proba(example, lm=lm), npt.NDArray[np.float64])
    assert_type(predict_proba([example], lm=lm), list[npt.NDArray[np.float64]])
    assert_type(predict("Sky", ["blue", "red"], lm, search="best-first"), str)
    assert_type(predict([text, text], ["blue", "red"], aggregate="sum"), list[str])
    predict_proba("Sky", ["blue", "red"], lm, priors=[0.5, 0.5])  # type: ignore[call-overload]

"""Rating tokens with the kernel, against torch's functions; on the CPU Triton's interpreter runs the kernel."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="there is no wheel of triton for this platform")

from backprompt import LM, NonFiniteError, Text, evaluate
from backprompt.evaluation import rating, rating_triton
from backprompt.evaluation.rating import rate_by_torch, rate_for, rated_tokens
from backprompt.evaluation.rating_triton import reason_against
from comparing import assert_close
from quick import up_to
from reference import plain_is_argmax, plain_token_logprobs
from tiny_models import FAMILIES

# The interpreter subtracts infinities with numpy, which warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def no_launchers():
    """The kernels may be others during the test."""
    rating_triton.launchers.cache_clear()
    yield
    rating_triton.launchers.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch, no_launchers):
    monkeypatch.setattr(rating_triton, "COLUMNS", 32)
    monkeypatch.setattr(rating_triton, "TOKENS", 16)


@pytest.fixture
def by_kernel(monkeypatch):
    """The kernel rates, whatever the device."""
    monkeypatch.setattr(rating, "rate_for", lambda *given, **options: rating_triton.rate)


def assert_rated_as_by_torch(logits, rows, token_ids):
    logprobs, is_argmax, is_usable = rating_triton.rate(logits, rows, token_ids)
    _, are_argmax, are_usable = rate_by_torch(logits, rows, token_ids)
    expected = logits.double().log_softmax(dim=-1)[rows, token_ids]
    assert (logprobs.dtype, is_argmax.dtype, is_usable.dtype) == (torch.float32, torch.bool, torch.bool)
    assert torch.equal(is_usable, are_usable)
    assert torch.equal(is_argmax[is_usable], are_argmax[is_usable])
    units = torch.finfo(torch.float32).eps * rating_triton.TOLERANCE
    torch.testing.assert_close(logprobs[is_usable].double(), expected[is_usable], rtol=units, atol=units)


VALUES = st.sampled_from([-torch.inf, -torch.inf, -1000.0, -3.0, 0.0, 0.5, 0.5, 7.0, 7.0, 900.0])
SPOILED = st.sampled_from([torch.nan, torch.inf, -torch.inf, 7.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=up_to(25), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), num_columns=st.sampled_from([1, 31, 32, 33, 64, 100]), num_rows=st.integers(1, 4))
def test_every_token_of_rows_with_ties_infinities_and_nan(dtype, data, num_columns, num_rows, small_blocks):
    """Each row's tokens, the first and the last column among them, also of a slice of a larger tensor."""
    rows = st.lists(st.lists(VALUES, min_size=num_columns, max_size=num_columns), min_size=num_rows, max_size=num_rows)
    logits = torch.tensor(data.draw(rows), dtype=dtype)
    logits[data.draw(st.integers(0, num_rows - 1)), data.draw(st.integers(0, num_columns - 1))] = data.draw(SPOILED)
    if data.draw(st.booleans()):
        logits = torch.cat([logits, torch.zeros_like(logits)], dim=1)[:, :num_columns]
    row_idx = torch.arange(num_rows, device=DEVICE).repeat_interleave(num_columns)
    token_ids = torch.arange(num_columns, device=DEVICE).repeat(num_rows)
    assert_rated_as_by_torch(logits.to(DEVICE), row_idx, token_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_as_long_as_vocabularies(dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((3, 50257), generator=generator).mul(4).to(DEVICE, dtype)
    row_idx = torch.tensor([0, 0, 1, 1, 2, 2], device=DEVICE)
    token_ids = torch.tensor([0, 50256, 4095, 4096, 8191, 8192], device=DEVICE)
    assert_rated_as_by_torch(logits, row_idx, token_ids)
    assert_rated_as_by_torch(logits, torch.arange(3, device=DEVICE), logits.float().argmax(dim=-1))


@pytest.mark.parametrize("is_aligned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees_with_torch(dtype, is_aligned):
    assert reason_against(DEVICE, dtype, is_aligned) is None


class Failing:
    def __getitem__(self, grid):
        raise RuntimeError("no compiler\nand more")


class Changing:
    """The kernel, and then a change of what it found: the maxima, their logarithms, or the columns of the maxima."""

    def __init__(self, kernel, idx, change):
        self.kernel, self.idx, self.change = kernel, idx, change

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.kernel[grid](*args, **options)
            args[self.idx].add_(self.change)

        return launch


@pytest.mark.usefixtures("no_launchers")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda kernel: Failing(), "triton failed: no compiler"),
        (lambda kernel: Changing(kernel, 2, 1e-5), "triton was off by "),
        (lambda kernel: Changing(kernel, 2, torch.nan), "triton was off by inf"),
        (lambda kernel: Changing(kernel, 3, 1), "triton was off by inf"),
    ],
    ids=["fails", "other sums", "nan", "other maxima"],
)
def test_torch_rates_where_the_kernel_is_wrong(make, reason, monkeypatch):
    monkeypatch.setattr(rating_triton, "rows_kernel", make(rating_triton.rows_kernel))
    assert reason_against(DEVICE, torch.float32, True).startswith(reason)


@pytest.fixture
def nothing_chosen():
    rate_for.cache_clear()
    yield
    rate_for.cache_clear()


@pytest.mark.usefixtures("nothing_chosen")
def test_the_choice(monkeypatch):
    """The kernel on CUDA, after a comparison; torch for all else, and where there is no Triton."""
    compared = []
    monkeypatch.setattr(rating_triton, "reason_against", lambda *given: compared.append(given))
    for given_ in (("cpu", torch.float32), ("mps", torch.float32), ("cuda", torch.float64)):
        assert rate_for(*given_, is_aligned=True) is rate_by_torch
    assert not compared
    for is_aligned in (True, False, True):
        assert rate_for("cuda", torch.bfloat16, is_aligned=is_aligned) is rating_triton.rate
    assert compared == [(torch.device("cuda"), torch.bfloat16, True), (torch.device("cuda"), torch.bfloat16, False)]
    monkeypatch.setattr(rating_triton, "reason_against", lambda *given: "off")
    assert rate_for("cuda", torch.float32, is_aligned=True) is rate_by_torch
    monkeypatch.setitem(sys.modules, "backprompt.evaluation.rating_triton", None)
    assert rate_for("cuda", torch.float16, is_aligned=True) is rate_by_torch


@pytest.mark.usefixtures("no_launchers")
def test_a_slice_takes_two_launches(monkeypatch):
    """However many rows and tokens it has."""
    launched = []

    class Counting(Changing):
        def __getitem__(self, grid):
            launched.append(grid)
            return self.kernel[grid]

    for name in ("rows_kernel", "tokens_kernel"):
        monkeypatch.setattr(rating_triton, name, Counting(getattr(rating_triton, name), None, None))
    logits = torch.zeros((40, 50), device=DEVICE)
    rating_triton.rate(
        logits, torch.arange(600, device=DEVICE) % 40, torch.zeros(600, dtype=torch.int64, device=DEVICE)
    )
    assert launched == [(40,), (3,)]


def rate_some(num_rows, num_tokens):
    logits = torch.zeros((num_rows, 5000), device=DEVICE, dtype=torch.bfloat16)
    row_idx, token_ids = torch.zeros((2, num_tokens), device=DEVICE, dtype=torch.int64)
    return rating_triton.rate(logits, row_idx, token_ids)


@pytest.mark.cuda
def test_slices_of_other_sizes_compile_nothing_new():
    compiled = []
    for sizes in ((1, 1), (16, 16), (17, 33), (40, 257), (111, 4096)):
        rate_some(*sizes)
        kernels = (rating_triton.rows_kernel, rating_triton.tokens_kernel)
        compiled.append([sum(len(caches[0]) for caches in kernel.device_caches.values()) for kernel in kernels])
    assert compiled == compiled[:1] * 5


@pytest.mark.cuda
def test_rating_waits_for_nothing():
    rate_some(3, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rate_some(4, 7)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_on_cuda_the_kernel_is_chosen():
    for dtype in DTYPES:
        assert rate_for("cuda", dtype, is_aligned=True) is rating_triton.rate
        assert rate_for("cuda", dtype, is_aligned=False) is rating_triton.rate


# Whole models


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_those_of_the_plain_call(dtype, tokenizer):
    model = FAMILIES["llama"]().to(DEVICE, dtype)
    lm = LM(model, tokenizer)
    texts = [Text(f"The cat sat on the mat, and {number}", lm) for number in range(3)]
    for text, scores in zip(texts, lm.token_scores(texts), strict=True):
        logits = text.model_repr.all_logits().float()[:-1]
        expected = logits.log_softmax(dim=-1)[range(len(logits)), text.tokens[1:]]
        assert_close(scores.logprobs[1:], expected, atol=1e-5)
        assert scores.is_argmax[1:].tolist() == (logits.argmax(dim=-1).cpu() == torch.tensor(text.tokens[1:])).tolist()
        if dtype == torch.float32:
            assert_close(scores.logprobs, plain_token_logprobs(model, text.tokens))
            assert torch.equal(scores.is_argmax.cpu(), plain_is_argmax(model, text.tokens))


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize(
    ("value", "what"), [(torch.nan, "NaN logits"), (torch.inf, r"logits of \+inf"), (-torch.inf, "-inf for every")]
)
def test_a_row_that_is_no_distribution_is_the_same_error(value, what, lm, monkeypatch):
    executor = lm.session.evaluator.executor
    head = executor.logits
    lm.token_logprobs([Text("The probe", lm)])

    def spoiled(hidden):
        logits = head(hidden).clone()
        logits[-1, slice(None) if value == -torch.inf else 7] = value
        return logits

    monkeypatch.setattr(executor, "logits", spoiled)
    with pytest.raises(NonFiniteError, match=f"{what}.* at the end of 'The cat sat on the m'"):
        lm.token_logprobs([Text("The cat sat on the mat", lm)])


def test_the_cpu_rates_in_pieces(monkeypatch):
    """Of 4 rows at a time; the scores are those of one piece."""
    monkeypatch.setattr(rating, "LOG_SOFTMAX_BYTES", 4 * 4 * 50)
    logits = torch.randn((10, 50), generator=torch.Generator().manual_seed(0))
    row_idx, token_ids = np.repeat(np.arange(10), 3), np.arange(30) % 7
    found = rated_tokens(logits, row_idx, token_ids)
    expected = logits.log_softmax(dim=-1)[row_idx, token_ids]
    torch.testing.assert_close(found.scores.logprobs, expected, rtol=0, atol=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError], ids=lambda error: error.__name__)
def test_an_error_keeps_the_scores_of_the_slices_before_it(error, lm, monkeypatch):
    """Of 20 rows, 4 at a time, 8 are scored; later the other 12 are. Candidates are among both."""
    executor = lm.session.evaluator.executor
    monkeypatch.setattr(type(executor), "rows_in_a_slice", 4)
    evaluate(Text("The probe", lm))
    texts = [Text.from_tokens(range(first, first + 6), lm) for first in (10, 20, 30, 40)]
    head, num_slices = executor.logits, 0

    def fail(hidden):
        nonlocal num_slices
        num_slices += 1
        if num_slices == 3:
            raise error
        return head(hidden)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "logits", fail)
        with pytest.raises(error):
            lm.token_logprobs(texts)
    before = lm.stats
    found = lm.token_logprobs(texts)
    done = lm.stats - before
    assert (done.logit_rows, done.tokens_computed) == (12, 0)
    for text, logprobs in zip(texts, found, strict=True):
        assert_close(logprobs, plain_token_logprobs(lm.model, text.tokens))

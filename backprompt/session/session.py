"""Session: one state of a model's weights and of its tokenizer, and all results that were computed with them.

    texts --Encoder--> token ids --Forest, plan--> passes --Executor--> blocks of rows --> ModelRepr

An `LM` has one session and passes it to the modules that work with texts: representations, generation, pictures,
classification. The session keeps the lock that guards all of this state, the current evaluator and encoder, the
fingerprint of their weights and tokenizer, and the counters of work. When the weights or the tokenizer change, the
session makes another evaluator, encoder and fingerprint.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from backprompt.errors import StaleRepresentationError
from backprompt.evaluation.archive import Archive
from backprompt.evaluation.computation import Means
from backprompt.evaluation.counters import Counters
from backprompt.evaluation.distributions import Asked, Distributions, distributions
from backprompt.evaluation.evaluator import Evaluator
from backprompt.evaluation.pools import Pools
from backprompt.evaluation.reading import Wanted
from backprompt.evaluation.scoring import Scoring
from backprompt.forest.span import Span
from backprompt.forking import watch_lm
from backprompt.memory.eviction import GreedyDual, Memory
from backprompt.memory.host import HostMemory
from backprompt.memory.location import Location
from backprompt.model.executor import Executor
from backprompt.model.skeleton import check_supported, unwrap
from backprompt.model.spread import head_device
from backprompt.model.surroundings import set_gradients, without_modes
from backprompt.session.budgets import Budgets
from backprompt.session.evaluated import Batch, Evaluated
from backprompt.session.fingerprint import Fingerprint
from backprompt.session.limits import TextLimits
from backprompt.session.options import Options, check_can_pin
from backprompt.session.probes import Probes
from backprompt.session.room import Room
from backprompt.session.sharing import Answer, Call, Line
from backprompt.session.texts import TextSession
from backprompt.session.together import Found, Needed, TextsCall
from backprompt.store import Store, open_store
from backprompt.text.node import Text
from backprompt.tokens.adapted import plain
from backprompt.tokens.encoder import Encoder
from backprompt.tokens.tokenizer import PrivateTokenizer

logger = logging.getLogger(__name__)

MAX_RESULT_BYTES = 256 << 20
"""The limit of the pool of logit rows, which are large (200 kB in GPT-2) and cheap to compute again."""


class Session(TextSession):
    """The shared state of an `LM`, for the modules that work with its texts.

    Args:
        model: the user's model; never changed.
        tokenizer: the user's tokenizer; never changed.
        options: checked options.

    Attributes:
        line: the lock that guards all of the session, and the threads that wait for it; see `exclusive`.
        store: the store of representations, or None.
        counters: the work that was done since the session began.
        fingerprint: names the weights and the tokenizer of the evaluator and the encoder.
        encoder: turns texts into token ids.
        evaluator: computes and holds results. The weights may have changed since: `current` checks.

    """

    def __init__(self, model: nn.Module, tokenizer: Any, options: Options) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.options = options
        causal_lm = unwrap(model)
        check_supported(causal_lm)
        if options.pin_memory:
            check_can_pin(head_device(causal_lm))
        self._budgets = Budgets.of(options, causal_lm)
        self.line = Line()
        self.room = Room(self.line.lock)
        self._depth = 0  # of `exclusive`
        self._forking_process = os.getpid()
        self._has_failed = False  # since the evaluator last recovered
        self._has_looked = False  # at weights and tokenizer, since the lock was taken
        self.counters = Counters()
        self.store: Store | None = None
        private = PrivateTokenizer(tokenizer)
        if isinstance(options.store, (str, os.PathLike)):
            self.store = open_store(options.store)
            weakref.finalize(self, self.store.close)  # no caller has this store to close it
        else:
            self.store = options.store
        self.fingerprint = Fingerprint(model, private, self.store)  # before the first use of the weights
        self.evaluator = self._make_evaluator(self.fingerprint)
        self.encoder = _make_encoder(self.options, private, self.evaluator)
        self._evaluated: WeakKeyDictionary[Text, Evaluated] = WeakKeyDictionary()
        self._probes = Probes()
        watch_lm(self)

    # The lock, and one state of the weights

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock, and suspend the caller's torch settings; all results are of one state of the weights.

        After any error inside, the evaluator recovers before its next use.

        Raises:
            StaleRepresentationError: weights changed meanwhile.

        """
        place, line, had_gradients = object(), self.line, torch.is_grad_enabled()
        line.places[place] = None
        try:
            with line.lock, without_modes(self.evaluator.executor.device):
                set_gradients(False)
                line.leave(place)
                if self._has_failed:
                    self.evaluator.computation.recover()
                    self._has_failed = False
                depth, had_looked = self._depth, self._has_looked
                try:
                    self._depth = depth + 1
                    work_before = self.counters.work
                    yield
                    if self.counters.work != work_before:
                        self.evaluator.computation.check_unchanged()
                except BaseException:
                    self._has_failed = True
                    raise
                finally:
                    self._depth, self._has_looked = depth, had_looked
        finally:
            set_gradients(had_gradients)
            line.places.pop(place, None)

    def answer(self, call: Call[Answer]) -> Answer:
        """Return the answer to a call, computed along with other waiting calls; see sharing.py."""
        line = self.line
        line.places[call] = None
        try:
            with line.lock:
                if self._depth == 0:  # a call within another one is part of it
                    line.give_way(call)
                    calls = line.joining(call)
                    if len(calls) > 1:
                        self.answer_together(calls)
                line.leave(call)
                call.check_cancelled()
                with self.exclusive():
                    return call.finish()
        finally:
            line.places.pop(call, None)

    def answer_together(self, calls: Sequence[Call[Any]]) -> None:
        """Answer calls, all calls of a kind together. If that fails, the thread of each call answers it alone."""
        if len({call.together for call in calls}) > 1:
            calls = [*(ahead for call in calls for ahead in call.ahead()), *calls]
        for together in dict.fromkeys(call.together for call in calls):
            own = [call for call in calls if call.together is together]
            num_requested = self.counters.tokens_requested
            try:
                with self.exclusive():
                    together(self.current(), own)
            except Exception as error:  # raised again in the thread of the call that caused it
                logger.debug("%d calls are answered one by one: %s", len(own), error)
                self.counters.tokens_requested = num_requested
                for call in own:
                    call.is_alone = True
            else:
                for call in own:
                    call.is_answered = call.found is not None

    @property
    def is_nested(self) -> bool:
        """Whether the call in progress is part of another call; the lock must be held."""
        return self._depth > 1

    def current(self, *, with_weights: bool = True, with_numbers: bool = True) -> Evaluator:
        """Return the evaluator of the weights and the tokenizer as they are now; the lock must be held.

        The first call since the lock was taken checks both for changes, and `exclusive` checks again at the end of
        work.

        Args:
            with_weights: False checks only the tokenizer, which is enough to encode texts.
            with_numbers: False checks the weights without their numbers, which the caller checks later.

        """
        tokenizer = self.fingerprint.tokenizer
        has_to_look = not self._has_looked or self.evaluator.is_closed
        if has_to_look and tokenizer.has_changed():
            logger.info("The tokenizer has changed.")
            self._start_over(Fingerprint(self.model, PrivateTokenizer(self.tokenizer), self.store))
        elif not with_weights:
            return self.evaluator
        elif has_to_look:
            have_changed = self.fingerprint.has_changed if with_numbers else self.fingerprint.has_moved
            if have_changed() or self.evaluator.is_closed:
                self._start_over(Fingerprint(self.model, tokenizer, self.store))
        self._has_looked = True
        self.evaluator.continuations.end_abandoned()
        self.evaluator.hold_pins()
        return self.evaluator

    @contextmanager
    def growing(self, expected: Evaluator | None) -> Iterator[Evaluator]:
        """Hold the lock and yield the evaluator for a step of a generation that was begun with `expected`.

        A step checks the numbers of the weights once, before a token is chosen: see `Computation.check_unchanged`.

        Raises:
            StaleRepresentationError: the generation was begun with other weights.

        """
        with self.exclusive():
            evaluator = self.current(with_numbers=expected is None)
            if expected is not None and evaluator is not expected:
                raise StaleRepresentationError(
                    "The model's weights (or its tokenizer) have changed since this continuation was begun. Begin "
                    "again: text.generate(...)."
                )
            yield evaluator

    def clear(self) -> None:
        """Drop all results; see `LM.clear`."""
        with self.exclusive():
            self.evaluator.continuations.end_abandoned()
            self.evaluator.computation.clear()

    def refresh(self, *, compare: bool) -> None:
        """Hash every weight and the tokenizer again, or assume changed weights; see `LM.refresh`."""
        with self.exclusive():
            tokenizer = PrivateTokenizer(self.tokenizer)
            if not compare:
                self._start_over(Fingerprint(self.model, tokenizer, self.store))
            elif (renewed := self.fingerprint.renewed(tokenizer)) is not None:
                self._start_over(renewed, probe_again=True)  # no check sees changed settings of modules

    def before_fork(self) -> None:
        """Take the lock, so that no other thread is in the middle of a change while the process is forked."""
        self.line.lock.acquire()
        self._forking_process = os.getpid()

    def after_fork(self) -> None:
        """Release the lock."""
        if os.getpid() != self._forking_process:
            self.line.forget_others()
            self.room.forget()
        self.line.lock.release()

    # Results

    @property
    def limits(self) -> TextLimits:
        """The limits for texts that can be evaluated."""
        executor = self.evaluator.executor
        return TextLimits(executor.limits, self.options.beyond_trained_length, executor.adapters.numbers)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the output head predicts."""
        return self.evaluator.executor.vocab_size

    @property
    def scoring(self) -> Scoring:
        """Scores texts; the lock must be held, and `current` called before."""
        return self.evaluator.scoring

    def distributions(self, wanted: Sequence[Wanted], asked: Asked) -> Distributions:
        """Return the requested results of the distributions that predict tokens; the lock must be held."""
        return distributions(self.current().computation, wanted, asked)

    def evaluate(self, texts: Sequence[Text]) -> list[Evaluated]:
        """Evaluate the texts and return them; only missing spans are computed. The lock must be held."""
        evaluator = self.current()
        found = zip(texts, map(self._evaluated.get, texts), strict=True) if self._evaluated else ()
        known = {text: evaluated for text, evaluated in found if evaluated is not None and evaluated.is_computed}
        evaluator.memory.touch([found.end for found in known.values()])
        if len(known) == len(texts):  # their ids were checked when they were evaluated
            self.counters.tokens_requested += sum(len(known[text].token_ids) for text in texts)
            return [known[text] for text in texts]
        encoded = self.checked_ids(texts)
        missing = {text: ids for text, ids in zip(texts, encoded, strict=True) if text not in known}
        if missing:
            ends = evaluator.evaluate(list(missing.values()))
            batch = Batch(evaluator)
            new = {text: batch.add(end, ids) for end, (text, ids) in zip(ends, missing.items(), strict=True)}
            self._evaluated.update(new)
            known |= new
        return [known[text] for text in texts]

    def evaluated(self, texts: Sequence[Text], *, begins: bool) -> list[Evaluated]:
        """Evaluate the texts along with those of other calls; `begins`: count an evaluation even if none is needed."""

        def alone() -> list[Evaluated]:
            if begins:
                self.current().forest.begin_evaluation()
            return self.evaluate(texts)

        def needed() -> Needed | None:
            known = self.computed_ends(texts)
            return None if all(known) else Needed([Wanted(i, len(i)) for i in self.checked_ids(texts)], known)

        def answer(found: Found) -> list[Evaluated]:
            if found.batch.evaluator is not self.evaluator:
                return alone()
            for text, end, item in zip(texts, found.ends, found.items, strict=True):
                known = self._evaluated.get(text)
                if known is None or not known.is_computed:
                    self._evaluated[text] = found.batch.add(end, item.token_ids)
            return list(map(self._evaluated.__getitem__, texts))

        return self.answer(TextsCall(alone, needed, answer))

    def read(self, text: Text) -> Evaluated:
        """Return an evaluated text to read results from; it is evaluated now if its states are not in memory."""
        with self.exclusive():
            found = self.held(text)
        return self.evaluated([text], begins=False)[0] if found is None else found

    def held(self, text: Text) -> Evaluated | None:
        """Return an evaluated text if its states are in memory, else None; the lock must be held.

        This requests no tokens, and takes half as long as an evaluation.
        """
        evaluator = self.current()
        found = self._evaluated.get(text)
        if found is None or not found.is_computed:
            return None
        evaluator.memory.touch([found.end])
        return found

    def computed_ends(self, texts: Sequence[Text]) -> list[Span | None]:
        """Return the end of each text whose states are in memory, else None; the lock must be held."""
        if not self._evaluated:
            return [None] * len(texts)
        found = map(self._evaluated.get, texts)
        return [None if evaluated is None or not evaluated.is_computed else evaluated.end for evaluated in found]

    # The tokenizer and the model

    @property
    def private_tokenizer(self) -> PrivateTokenizer:
        """The copy of the tokenizer that encodes and decodes."""
        return self.fingerprint.tokenizer

    @property
    def causal_lm(self) -> Any:
        """The causal LM inside all wrappers of the model."""
        return unwrap(self.model)

    # Making and starting over

    def _make_evaluator(self, fingerprint: Fingerprint) -> Evaluator:
        model, archive = unwrap(self.model), None
        pinned = Location(torch.device("cpu"), self.options.pin_memory)
        decode = partial(_decoded, fingerprint.tokenizer)
        if self.store is not None:  # a cycle with the session would keep tensors alive for longer than the LM
            root = partial(fingerprint.root, in_store=True)
            archive = Archive(self.store, root, fingerprint.has_changed, decode)
        executor = Executor(model, decode, pack_weights=self.options.pack_weights)
        if executor.steps is not None:
            executor.steps.look = fingerprint.look
        order = GreedyDual(executor.hidden_size)
        here = Location(executor.device, device_of=executor.device_of)
        host = HostMemory(self._budgets.host, order.rank, pinned, here)
        return Evaluator(
            Means(
                model=model,
                has_changed=fingerprint.has_changed,
                has_moved=fingerprint.has_moved,
                executor=executor,
                memory=Memory(self._budgets.device, order, host),
                pools=Pools(MAX_RESULT_BYTES),
                archive=archive,
                counters=self.counters,
                max_tokens_per_forward=self.options.max_tokens_per_forward,
            )
        )

    def _start_over(self, fingerprint: Fingerprint, *, probe_again: bool = False) -> None:
        """Start over with the current model and tokenizer, which `fingerprint` names.

        If the model can no longer be evaluated, the session stays unchanged. After a later error the old evaluator is
        closed; `current` notices this and starts over once more.
        """
        logger.info("Weights or tokenizer have changed: dropping all results of the old ones.")
        evaluator = self._make_evaluator(fingerprint)
        if probe_again:
            self._probes.forget()
        else:
            old = self.evaluator.computation
            self._probes.pass_on(self.fingerprint, old, fingerprint, evaluator.computation)
        encoder = _make_encoder(self.options, fingerprint.tokenizer, evaluator)
        self.evaluator.close()
        self.room.forget()
        self._evaluated = WeakKeyDictionary()
        self.encoder = encoder
        self.fingerprint = fingerprint
        self.evaluator = evaluator


def _decoded(tokenizer: PrivateTokenizer, token_ids: Sequence[int]) -> str:
    """Return the string of ids, under any adapters."""
    return tokenizer.decode(plain(token_ids))


def _make_encoder(options: Options, tokenizer: PrivateTokenizer, evaluator: Evaluator) -> Encoder:
    return Encoder(tokenizer, options.joins, options.add_special_tokens, evaluator.executor.adapters.number_of)

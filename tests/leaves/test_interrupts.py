"""Signals held back inside a context."""

import signal
import threading

import pytest

from dump_activations import interrupts
from dump_activations.interrupts import (
    HeldInterrupts,
    ignored_interrupts,
    terminated_like_interrupted,
)


@pytest.fixture
def received():
    """Install a handler of SIGTERM that only notes; return its notes."""
    notes = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: notes.append(number))
    yield notes
    signal.signal(signal.SIGTERM, before)


def test_an_interruption_waits_for_a_check():
    with HeldInterrupts() as held:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            held.check()
        held.check()  # once is enough


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_an_interruption_waits_for_the_end_and_an_error_stands_before_it(error):
    done = []

    def work():
        with HeldInterrupts():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
            if error:
                raise error

    with pytest.raises(error or KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def clock(monkeypatch):
    """Return the time that the contexts see, in a list."""
    now = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("is_handed_over", [False, True])
def test_a_second_signal_is_not_held(is_handed_over, clock):
    with HeldInterrupts() as held:
        signal.raise_signal(signal.SIGINT)
        if is_handed_over:
            with pytest.raises(KeyboardInterrupt):
                held.check()
        clock[0] = 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if not is_handed_over:
            with pytest.raises(KeyboardInterrupt):
                held.check()


def test_a_signal_that_a_launcher_repeats_is_one(clock):
    with HeldInterrupts() as held:
        for clock[0] in (0.0, 0.1, 0.9):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            held.check()
        signal.raise_signal(signal.SIGINT)
        held.check()


def test_contexts_may_be_nested(received):
    with HeldInterrupts():
        with HeldInterrupts():
            signal.raise_signal(signal.SIGTERM)
        assert received == []
    assert received == [signal.SIGTERM]


@pytest.mark.parametrize("came_before", [False, True])
def test_a_check_looks_at_the_contexts_around_its_own(came_before):
    with HeldInterrupts() as outer:
        if came_before:
            signal.raise_signal(signal.SIGINT)
        with HeldInterrupts() as inner:
            if not came_before:
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                inner.check()
        outer.check()


def test_signals_without_a_handler_and_other_threads_are_left_alone():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with HeldInterrupts():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    handlers = []

    def work():
        with HeldInterrupts() as held:
            handlers.append(signal.getsignal(signal.SIGINT))
            held.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_other_threads_install_no_handler():
    entered = []

    def work():
        with terminated_like_interrupted():
            entered.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [signal.SIG_DFL]


def test_what_is_ignored_in_a_context_is_heard_after_it(received):
    with ignored_interrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert received == []
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

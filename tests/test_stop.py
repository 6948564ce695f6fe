"""Which signals ask a run to stop."""

import os
import signal

import pytest

from spd_hydra.stop import StopSignals, handled_by, heard


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_heard_unless_it_is_ignored_as_below_nohup(ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        expected = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]
        assert heard(signal.SIGTERM, signal.SIGHUP) == expected
        with StopSignals().listening():
            assert (signal.getsignal(signal.SIGHUP) is signal.SIG_IGN) == ignored
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_python_does_not_know_is_replaced_by_the_default_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, object]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append((number, handler)))
    own = lambda number, frame: None  # noqa: E731
    with handled_by(own, signal.SIGTERM):
        assert calls == [(signal.SIGTERM, own)]
    assert calls[1:] == [(signal.SIGTERM, signal.SIG_DFL)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_signal_of_many_cluster_scripts_stops_a_run_as_sigterm_does(number: signal.Signals) -> None:
    signals = StopSignals()
    with signals.stepping():
        os.kill(os.getpid(), number)
        stopped = signals.agreed()
    assert stopped is not None
    assert (stopped.number, stopped.hands_over, stopped.exit_code) == (number, False, 143)

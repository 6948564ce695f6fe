"""Which signals ask a run to stop."""

import signal

import pytest

from spd_hydra.stop import StopSignals, heard


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

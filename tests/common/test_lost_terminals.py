"""A terminal that goes away: what is said to it, and who listens to its signal."""

import errno
import io
import signal

import pytest

from scalora.common.stopping import Forgiving, stop_signals


def test_a_terminal_that_is_gone_is_no_error(monkeypatch):
    """As when ssh is cut: each line would be one, before Python has heard of SIGHUP."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    let_go = []
    monkeypatch.setattr("scalora.common.stopping.let_go", let_go.append)
    assert Forgiving(Gone()).write("text") == 4
    assert let_go == [signal.SIGHUP]
    kept = io.StringIO()
    assert Forgiving(kept).write("text") == 4
    assert kept.getvalue() == "text"

    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Forgiving(Full()).flush()


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)

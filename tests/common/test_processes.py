"""A run of one process exchanges nothing, and what is said where the launcher's SIGTERM follows another's end."""

import os
import signal
import threading

import pytest

from scalora.cli.guard import guarded
from scalora.common import processes
from scalora.common.errors import AgreedError, ScaloraError


def test_one_process_makes_what_the_first_would_make():
    def refuse():
        raise ScaloraError("no")

    before = threading.active_count()
    assert processes.from_first(lambda: 3) == 3
    with pytest.raises(ScaloraError, match=r"^no$"):
        processes.from_first(refuse)
    assert threading.active_count() == before


@pytest.fixture
def other_has_ended(monkeypatch):
    """As one of two processes, where the connection to the other has broken."""
    monkeypatch.setattr(processes, "_group", "two")
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def work(then=None):
        with processes.ending_together():
            try:
                raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
            finally:
                if then is not None:
                    os.kill(os.getpid(), then)

    yield work
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("then", [None, signal.SIGTERM])
def test_the_other_has_ended_is_what_is_said(other_has_ended, capsys, then):
    with pytest.raises(SystemExit) as end, guarded():
        other_has_ended(then)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")


def test_who_presses_control_c_is_told_that_it_stopped(other_has_ended, capsys):
    with pytest.raises(SystemExit) as end, guarded():
        other_has_ended(signal.SIGINT)
    assert (end.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_other_errors_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(processes, "_group", "two")
    with pytest.raises(RuntimeError, match=r"^of its own$"), processes.ending_together():
        raise RuntimeError("of its own")
    with pytest.raises(KeyboardInterrupt), processes.ending_together():
        raise KeyboardInterrupt
    with pytest.raises(AgreedError, match=r"^all$"), processes.ending_together():
        raise AgreedError("all")

"""Ctrl-C, SIGTERM and SIGHUP, by a real signal to a real process, in every phase of a run; and what a run tells."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from helpers import workspace
from scalora.cli.guard import guarded
from scalora.common.errors import ScaloraError
from scalora.runs import callbacks
from scalora.runs.callbacks import StepTimer, StopOnSignal


@pytest.fixture(scope="module")
def laid(tmp_path_factory):
    """A recipe, and overrides with so many rows that scoring them takes minutes."""
    folder = tmp_path_factory.mktemp("ground")
    recipe = workspace.lay(folder)
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    words, draw = sorted({word for row in rows for word in row["text"].split()}), random.Random(0)
    many = [
        json.dumps({"id": str(i), "text": " ".join(draw.choices(words, k=30)), "label": i % 2}) for i in range(21000)
    ]
    (folder / "many.jsonl").write_text("\n".join(many))
    long = [f"task.data.train={folder / 'many.jsonl'}", "task.data.test_size=20000", "score_batch_size=1"]
    return folder, recipe, long


def _stop(recipe, overrides, line):
    """Send Ctrl-C when the run has said what matches `line`; exit code, what it said, and seconds until it ended."""
    command = [sys.executable, "-m", "scalora", "train", str(recipe)]
    command += [part for override in overrides for part in ("--set", override)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = []
    for text in process.stdout:
        said.append(text.rstrip())
        if re.match(line, said[-1]):
            break
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    assert stderr, said[-5:]
    return process.returncode, said + stdout.splitlines(), stderr.strip().splitlines()[-1], time.monotonic() - began


@pytest.mark.parametrize("phase", ["loading data and model", r"  scoring before training: \d+/\d+, about \d+ \w+ left"])
def test_before_training_ctrl_c_stops_at_once(laid, phase):
    folder, recipe, long = laid
    code, said, last, seconds = _stop(recipe, [*long, f"output={folder / 'scoring'}"], phase)
    assert code == 130
    assert last == "stopped; no checkpoint was written yet"
    assert "training" not in said
    assert seconds < 10  # of minutes; most of it is Python's own end
    assert not (folder / "scoring").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_sigterm_name_the_last_checkpoint_and_exit_with_130(laid, number):
    folder, recipe, _ = laid
    output = folder / f"cut-{number}"
    options = ["--set", "training.max_steps=100000", "--set", f"output={output}"]
    command = [sys.executable, "-m", "scalora", "train", str(recipe), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # should the tests themselves run under nohup
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/checkpoint-*/seal.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"^stopping after this step, about \d+ s; Ctrl-C again stops at once$", stdout, re.MULTILINE)
    assert "last checkpoint" in stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr


def test_sigterm_before_the_first_step_leaves_nothing_behind(laid):
    folder, recipe, _ = laid
    command = [sys.executable, "-m", "scalora", "train", str(recipe), "--set", f"output={folder / 'early'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "early" / "recipe.yaml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1].startswith("stopped")
    assert not (folder / "early").exists()


def test_a_signal_is_answered_while_torch_is_busy():
    """Python's own handlers run only once a long call into torch has returned."""
    answers = []
    stop = StopOnSignal(lambda text: answers.append((text, time.monotonic())), StepTimer())
    state, control = TrainerState(), TrainerControl()
    factor = torch.randn(4000, 4000)
    stop.on_train_begin(TrainingArguments(use_cpu=True), state, control)
    try:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        torch.mm(factor, factor)
        returned = time.monotonic()
        timer.join()
        deadline = returned + 10
        while not answers and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop.restore()
    assert answers[0][0] == "stopping after this step; Ctrl-C again stops at once"
    assert answers[0][1] < returned
    assert stop.received == signal.SIGINT
    stop.on_step_end(TrainingArguments(use_cpu=True), state, control)
    assert control.should_save
    assert control.should_training_stop


def test_the_second_ctrl_c_stops_at_once():
    answers = []
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnSignal(answers.append, StepTimer())
    stop.on_train_begin(TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGINT) is before
    deadline = time.monotonic() + 10
    while len(answers) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert answers[1] == "stopping"


IMPORTING = """
import signal, sys

module, number, seen = sys.argv[1], int(sys.argv[2]), []
sys.argv[1:] = sys.argv[3:]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module and not seen:
            seen.append(name)
            RAISE

sys.meta_path.insert(0, Finder())
from scalora.__main__ import main
main()
"""
PLAIN = "signal.raise_signal(number)"
# What Python makes of it where a class is being made, before transformers makes its own of that.
WRAPPED = """try:
                signal.raise_signal(number)
            except KeyboardInterrupt as error:
                raise RuntimeError("Error calling __set_name__") from error"""


def _stopped_while_importing(module, number, what, *arguments):
    code = IMPORTING.replace("RAISE", what)
    command = [sys.executable, "-c", code, module, str(int(number)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 130, done.stderr
    return done.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("scalora.common", signal.SIGINT),
        ("scalora.common.stopping", signal.SIGINT),
        ("scalora.cli", signal.SIGINT),
        ("scalora.cli", signal.SIGTERM),
        ("scalora.cli.guard", signal.SIGTERM),
        ("rich.table", signal.SIGINT),
    ],
)
@pytest.mark.parametrize("what", [PLAIN, WRAPPED])
def test_a_signal_while_the_command_is_imported(module, number, what):
    if "common" in module and what is WRAPPED:
        pytest.skip("nothing is imported there but our own modules of a few lines")
    assert _stopped_while_importing(module, number, what, "methods") == ["stopped"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_transformers_takes_for_a_missing_module(laid, number):
    folder, recipe, _ = laid
    module = "transformers.models.llama.configuration_llama"
    said = _stopped_while_importing(module, number, WRAPPED, "train", recipe, "--set", f"output={folder / 'lazy'}")
    assert said[-1].startswith("stopped")
    assert not (folder / "lazy").exists()


@pytest.fixture
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _wrapped(number):
    try:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error
    except RuntimeError as error:
        raise ScaloraError("the files are damaged") from error


def _swallowed(number):
    with suppress(KeyboardInterrupt):
        signal.raise_signal(number)
    raise ScaloraError("the files are damaged")


def _raised_by_another_handler(number):
    signal.signal(number, signal.default_int_handler)
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        raise LookupError("not there") from ValueError("another cause")


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", [signal.raise_signal, _wrapped, _swallowed, _raised_by_another_handler])
def test_a_signal_is_no_bad_input(how, number, capsys):
    with pytest.raises(SystemExit) as end, guarded():
        how(number)
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"
    with pytest.raises(SystemExit) as end, guarded():  # nothing is left of it
        raise ScaloraError("bad input")
    assert end.value.code == 2


@pytest.mark.usefixtures("_handlers")
def test_other_errors_are_as_they_were():
    with pytest.raises(LookupError, match="not ours"), guarded():
        raise LookupError("not ours")


def test_a_timer_knows_which_share_of_its_steps_waited_for_a_core(monkeypatch):
    seconds, waited = iter([0.0, 10.0, 20.0, 30.0]), iter([1.0, 2.0, 5.0, 50.0, 52.0])
    monkeypatch.setattr(callbacks, "seconds_waited", lambda: next(waited))
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(seconds))
    timer = StepTimer()
    assert timer.waited_share() is None
    for _ in range(2):
        timer.on_step_begin(None, None, None)
        timer.on_step_end(None, None, None)
    assert timer.waited_share() == pytest.approx((3.0 + 2.0) / 20.0)

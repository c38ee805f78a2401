"""Ctrl-C and SIGTERM, by a real signal to a real process, in every phase of a run; and what a run tells meanwhile."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from helpers import workspace
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_name_the_last_checkpoint_and_exit_with_130(laid, number):
    folder, recipe, _ = laid
    output = folder / f"cut-{number}"
    options = ["--set", "training.max_steps=100000", "--set", f"output={output}"]
    command = [sys.executable, "-m", "scalora", "train", str(recipe), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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

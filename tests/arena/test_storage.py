"""One comparison on several machines: its trials in a PostgreSQL server that these tests start and stop."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import optuna
import pytest

from helpers import comparisons, postgres, workspace
from scalora import ScaloraError
from scalora.arena import liveness, patience, run
from scalora.arena.queue import TrialQueue
from scalora.arena.results import read_comparison
from scalora.arena.storage import note, noted, open_study, read_storage

pytestmark = pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
INPUTS = {"data": {"train": "40 rows a"}, "tokenizer": "b", "base_model": "c"}


@pytest.fixture(scope="module")
def server():
    with postgres.running() as running:
        yield running


@pytest.fixture
def comparison(tmp_path):
    return comparisons.small(tmp_path)


@pytest.fixture
def tiny(comparison):
    """One method at one rate: two trials."""
    return dataclasses.replace(comparison, contenders=comparison.contenders[:1], rates=(1e-3,), seeds=(0,))


@pytest.fixture
def shared(server, request):
    """A comparison's place that is this test's own."""
    return read_storage(server.url(), request.node.name)


@pytest.fixture
def fake(monkeypatch):
    """Trials that take no time, and no page; what ran."""
    calls = []
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls))
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    return calls


def _say(log, *words):
    with open(log, "a") as stream:  # one short write: lines of several processes do not mix
        stream.write(" ".join(map(str, words)) + "\n")


def _machine(name, ahead, held, comparison, folder, storage):
    """A worker on a machine of its own name, whose clock is so many seconds ahead; perhaps a trial never ends."""
    liveness.HERE, liveness.SILENCE, clock = name, 8.0, time.time
    liveness.HEARTBEAT = run.HEARTBEAT = 0.5
    run._POLL, time.time = 0.2, lambda: clock() + ahead

    def run_trial(comparison, trial, alive, *_):
        label = f"{trial.stage}/{trial.contender}/{trial.lr}/{trial.seed}"
        _say(folder / "log", "begin", name, label)
        end = time.monotonic() + (1e6 if held else 0.5)
        while time.monotonic() < end:
            alive()
            time.sleep(0.2)
        _say(folder / "log", "end", name, label)
        return comparisons.fake_result(comparison, trial)

    run.run_trial, run.write_report = run_trial, lambda *arguments: None
    out = folder / name
    run.run_comparison(comparison, out, command="x", log=lambda line: None, inputs=INPUTS, storage=storage)


def test_three_workers_of_which_one_is_killed(comparison, tmp_path, server):
    """They begin at one moment in an empty database; clocks are hours apart, and none sees another's process."""
    storage = read_storage(server.url(database="template1"), "three")
    context, log = multiprocessing.get_context("fork"), tmp_path / "log"
    log.touch()
    workers = {
        name: context.Process(target=_machine, args=(name, ahead, held, comparison, tmp_path, storage))
        for name, ahead, held in (("fast", 3600, False), ("slow", -3600, False), ("killed", 0, True))
    }
    for worker in workers.values():
        worker.start()
    try:
        _until(lambda: "begin killed" in log.read_text())
        os.kill(workers["killed"].pid, signal.SIGKILL)
        for name in ("fast", "slow"):
            workers[name].join(120)
            assert workers[name].exitcode == 0
    finally:
        for worker in workers.values():
            worker.kill()
    lines = [line.split() for line in log.read_text().splitlines()]
    begun, ended = (Counter(label for word, _, label in lines if word == each) for each in ("begin", "end"))
    (lost,) = [label for word, name, label in lines if name == "killed"]
    assert len(begun) == len(ended) == 12
    assert set(ended.values()) == {1}
    assert begun - ended == Counter([lost])  # it alone began twice
    assert {name for word, name, _ in lines if word == "end"} == {"fast", "slow"}
    for name in ("fast", "slow"):
        assert len(read_comparison(tmp_path / name).results) == 12
        assert read_comparison(tmp_path / name).inputs == INPUTS
    study, _ = open_study(tmp_path, storage)
    assert sum("result" in each.user_attrs for each in study.trials) == 12
    # The machine that was gone comes back: it has its own folder made of what the others did.
    record = run.run_comparison(comparison, tmp_path / "killed", command="x", log=lambda line: None, storage=storage)
    assert len(log.read_text().splitlines()) == len(lines)
    assert len(record.results) == 12
    assert read_comparison(tmp_path / "killed").results == read_comparison(tmp_path / "fast").results


def _until(happens, seconds=120):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_comparisons_in_one_database_do_not_meet(tiny, tmp_path, shared, fake):
    other = dataclasses.replace(tiny, recipe=comparisons.small(tmp_path, "task.data.seed=1").recipe)
    for each, storage in ((tiny, shared), (other, shared._replace(study="another"))):
        run.run_comparison(each, tmp_path / storage.study, command="x", log=lambda line: None, storage=storage)
    assert len(fake) == 4
    with pytest.raises(ScaloraError, match=r"study 'another' in .*:\*\*\*@.* another task: choose another --study"):
        TrialQueue(tmp_path / "mixed", tiny, shared._replace(study="another"))


@pytest.mark.parametrize(
    ("key", "named"), [("data", "the data of train"), ("tokenizer", "the tokenizer"), ("base_model", "the base model")]
)
def test_a_machine_with_other_inputs_is_refused(tiny, tmp_path, shared, fake, key, named):
    order = {"command": "x", "log": lambda line: None, "storage": shared}
    run.run_comparison(tiny, tmp_path / "one", **order, inputs=INPUTS)
    other = INPUTS | {key: {"train": "40 rows z"} if key == "data" else "z"}
    with pytest.raises(ScaloraError, match=rf"^{named}.* of the comparison in study .*: .*choose another --study"):
        run.run_comparison(tiny, tmp_path / "two", **order, inputs=other)
    assert len(fake) == 2
    # Nor do results that were made of them come in with the folder they lie in.
    file = tmp_path / "one" / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"inputs": other}))
    with pytest.raises(ScaloraError, match=rf"^{named}.* of .*results.json.*choose another --output"):
        run.run_comparison(tiny, tmp_path / "one", **order, inputs=INPUTS)


def test_of_two_that_begin_at_one_moment_the_first_decides(tmp_path, shared):
    one, two = (open_study(tmp_path, shared)[0] for _ in range(2))
    note(one, "inputs", "mine")
    state = optuna.trial.TrialState.FAIL  # the other had looked before, and saw nothing
    two.add_trial(optuna.trial.create_trial(state=state, user_attrs={"inputs": "theirs"}))
    assert noted(one, "inputs") == noted(two, "inputs") == "mine"


def test_a_short_outage_is_waited_for(comparison, tmp_path, shared, fake, server, monkeypatch):
    monkeypatch.setattr(patience, "_PAUSE", 0.2)
    lines, back = [], threading.Timer(2.0, server.start)

    def run_trial(comparison, trial, alive, *_):
        if len(fake) == 3:
            server.stop()
            back.start()
            alive()  # a trial does not end because no sign of it gets through
        return comparisons.fake_result(comparison, trial, calls=fake)

    monkeypatch.setattr(run, "run_trial", run_trial)
    run.run_comparison(comparison, tmp_path / "out", command="x", log=lines.append, storage=shared)
    assert len(fake) == len(set(fake)) == 12
    assert sum("does not answer" in line for line in lines) == 1
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["results.json"]


def test_what_ended_during_an_outage_is_handed_in_later(comparison, tmp_path, shared, fake, server, monkeypatch):
    monkeypatch.setattr(patience, "_PAUSE", 0.1)
    monkeypatch.setattr(patience, "_PATIENCE", 1.0)

    def run_trial(comparison, trial, *_):
        if len(fake) == 3:
            server.stop()
        return comparisons.fake_result(comparison, trial, calls=fake)

    monkeypatch.setattr(run, "run_trial", run_trial)
    lines, order = [], {"command": "x", "storage": shared}
    begun = time.monotonic()
    with pytest.raises(ScaloraError, match=r"does not answer .*see to the server; the same command") as told:
        run.run_comparison(comparison, tmp_path / "out", **order, log=lines.append)
    assert time.monotonic() < begun + 20  # it is waited for once
    assert len(fake) == 4
    assert len(list((tmp_path / "out").glob("unsent-*.json"))) == 1
    assert "s3cret" not in "\n".join([str(told.value), *lines])
    server.start()
    TrialQueue(tmp_path / "out", comparison, shared._replace(study="not its own"))
    assert len(list((tmp_path / "out").glob("unsent-*.json"))) == 1
    record = run.run_comparison(comparison, tmp_path / "out", **order, log=lines.append)
    assert len(fake) == len(set(fake)) == 12
    assert record.results.keys() == set(fake)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["results.json"]


def test_a_worker_that_is_stopped_gives_its_trial_back(tiny, tmp_path, shared, fake, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    order = {"command": "x", "log": lambda line: None, "storage": shared}
    with monkeypatch.context() as patched:
        patched.setattr(run, "run_trial", stopped)
        patched.setattr(liveness, "HERE", "another machine, whose processes nobody sees from here")
        with pytest.raises(KeyboardInterrupt):
            run.run_comparison(tiny, tmp_path / "one", **order)
    monkeypatch.setattr(time, "sleep", pytest.fail)  # it is not waited for
    run.run_comparison(tiny, tmp_path / "two", **order)
    assert len(fake) == 2


def test_a_result_that_comes_after_its_worker_was_taken_for_dead_counts(comparison, tmp_path, shared):
    wanted = comparison.tuning()[:1]
    one, two = (TrialQueue(tmp_path / name, comparison, shared) for name in ("one", "two"))
    one.enqueue(wanted)
    assert one.take(wanted) == wanted[0]
    two.study.tell(one.running[wanted[0]].number, state=optuna.trial.TrialState.FAIL)
    two.enqueue(wanted)
    one.finish(wanted[0], comparisons.fake_result(comparison, wanted[0]))
    assert two.take(wanted) is None
    assert two.results().keys() == set(wanted)


def test_the_command_itself_and_no_password_anywhere(tmp_path, server):
    recipe, out = workspace.lay(tmp_path), tmp_path / "out"
    small = ["--set", "task.data.validation_size=10", "--set", "training.max_steps=2", "--no-curve", "--no-ranks"]
    small += ["--methods", "lora", "--lr", "1e-3", "--seeds", "1", "--extend", "0", "--study", "real"]
    command = [sys.executable, "-m", "scalora", "compare", str(recipe), *small, "--output", str(out)]
    done = subprocess.run([*command, "--storage", server.url()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    content = json.loads((out / "results.json").read_text())
    assert (
        f"--storage 'postgresql+psycopg://{postgres.USER}:***@127.0.0.1:{server.port}/postgres'" in content["command"]
    )
    assert len(content["trials"]) == 2
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "results.json"]
    said = done.stdout + done.stderr + "".join(file.read_text() for file in out.iterdir())
    assert "s3cret" not in said
    # Another machine, which knows the URL from its environment, finds all done, and writes a folder of its own.
    again = [*command[:-1], str(tmp_path / "other")]
    environment = {**os.environ, "SCALORA_STORAGE": server.url()}
    done = subprocess.run(again, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "other" / "results.json").read_text())["trials"] == content["trials"]
    # Its recipe differs: it is refused by name.
    other = [*command[:-1], str(tmp_path / "third"), "--set", "task.prompt='{text}?'", "--storage", server.url()]
    done = subprocess.run(other, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "another task: choose another --study" in done.stderr
    assert "s3cret" not in done.stderr
    assert dataclasses.asdict(read_comparison(out).comparison)["rates"] == (1e-3,)

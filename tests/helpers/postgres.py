"""A real PostgreSQL server for tests: made in a temporary folder, on a free port, and gone with the test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "scalora", "s3cret/@{word}"  # with all that a URL must quote


class Server:
    """A cluster of its own; it can be stopped, as a machine that loses power, and started again."""

    def __init__(self, folder: Path, programs: Path, owner: str | None) -> None:
        self.folder, self.programs = folder, programs
        self._owner = {} if owner is None else {"user": owner, "group": pwd.getpwnam(owner).pw_gid, "extra_groups": []}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def url(self, user: str = USER, password: str | None = "s3cret%2F%40%7Bword%7D", database: str = "postgres") -> str:
        secret = "" if password is None else f":{password}"
        return f"postgresql+psycopg://{user}{secret}@127.0.0.1:{self.port}/{database}"

    def make(self) -> None:
        (self.folder / "password").write_text(PASSWORD)
        if self._owner:
            for path in (self.folder, self.folder / "password"):
                shutil.chown(path, self._owner["user"])
        order = ["initdb", "-D", "data", "-U", USER, "-A", "scram-sha-256", "--pwfile", "password", "-E", "UTF8"]
        self._run(*order, "--locale", "C", "--no-sync")

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", "data")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.programs / program, *arguments],
            cwd=self.folder, stdout=subprocess.PIPE if program == "initdb" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT, env={**os.environ, "HOME": str(self.folder)}, timeout=120, check=False,
            **self._owner,
        )  # fmt: skip
        log = self.folder / "log"
        assert done.returncode == 0, (done.stdout, log.read_text() if log.exists() else "")


def missing() -> str | None:
    """Why there can be no server here; None where there can."""
    if _programs() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    if os.name != "posix" or (os.geteuid() == 0 and _owner() is None):
        return "PostgreSQL does not run as root, and there is no user postgres or nobody"
    return None


@contextmanager
def running() -> Iterator[Server]:
    programs = _programs()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="scalora-postgres-"))  # pytest's own folders are closed to other users
    server = Server(folder, programs, _owner() if os.geteuid() == 0 else None)
    try:
        server.make()
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    here = shutil.which("initdb")
    return Path(here).parent if here else found[-1].parent if found else None


def _owner() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)

"""Where a queue of trials lies: optuna's study on sqlite in the output folder, or in a database that machines share."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ..common.disk_layout import QUEUE, RESULTS
from ..common.errors import ScaloraError

AWAY = (StorageInternalError, SQLAlchemyError)  # what is raised where a database does not answer, or refuses
_LONGEST_NAME = 200
_ATTEMPTS = 10  # to make the tables, which several workers may do at one moment
# A server that is gone without a word is noticed after half a minute, not after TCP's quarter of an hour.
_TIMEOUTS = {"connect_timeout": 10, "tcp_user_timeout": 30_000}  # s, ms; of libpq, which both drivers use
_CLOCKS = {"postgresql": "SELECT EXTRACT(EPOCH FROM clock_timestamp())"}
_CLOCKS["mysql"] = _CLOCKS["mariadb"] = "SELECT UNIX_TIMESTAMP()"


class Storage(NamedTuple):
    """A database that machines share, and the name of the comparison in it."""

    url: URL
    study: str

    def __str__(self) -> str:
        return f"study {self.study!r} in {_masked(self.url)}"


def read_storage(url: str, study: str | None) -> Storage:
    """What ``--storage`` and ``--study`` name; nothing is opened.

    Raises:
        ScaloraError: the URL cannot be read, its driver is not installed, or the name is missing. No message holds the
            URL's password.
    """
    try:
        read = make_url(url)
    except (ArgumentError, ValueError):  # whose text may be the URL, password and all
        raise ScaloraError(
            "--storage is no URL of a database: write it as in postgresql+psycopg://user:password@host:5432/database"
        ) from None
    try:
        dialect = read.get_dialect()
        dialect.import_dbapi()
    except NoSuchModuleError:
        raise ScaloraError(
            f"--storage {_masked(read)}: {read.drivername} is no database that SQLAlchemy knows: take "
            "postgresql+psycopg or mysql+pymysql"
        ) from None
    except ImportError as error:
        raise ScaloraError(
            f"--storage {_masked(read)}: the driver {error.name or read.get_driver_name()} is not installed: "
            "pip install 'scalora[storage]' brings the one of postgresql+psycopg://"
        ) from None
    if dialect.is_async:
        raise ScaloraError(
            f"--storage {_masked(read)}: {read.get_driver_name()} is an asynchronous driver: take another, as in "
            "postgresql+psycopg://"
        )
    if not study or study.strip() != study or len(study) > _LONGEST_NAME:
        given = "is missing" if study is None else f"{study[:_LONGEST_NAME]!r} is no name"
        raise ScaloraError(
            f"--study {given}: with --storage (SCALORA_STORAGE) give a name of up to {_LONGEST_NAME} characters"
        )
    return Storage(read, study)


def without_password(arguments: Sequence[str], url: str, storage: Storage) -> list[str]:
    """Arguments of a command line as they may be recorded: where one holds the URL, its password is left out."""
    return [each.replace(url, _masked(storage.url)) for each in arguments]


def open_database(folder: Path, storage: Storage | None) -> RDBStorage:
    """Optuna's storage in a folder that exists, or the shared one; its tables are made where there are none.

    Raises:
        ScaloraError: the file is damaged; the server is not there, or refuses.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if storage is None:
        url, options = URL.create("sqlite", database=str((folder / QUEUE).resolve())), {}
    else:
        # A worker holds no connection while it trains: of a hundred workers a server sees few.
        url, options = storage.url, {"poolclass": NullPool, "connect_args": _timeouts(storage.url)}
    address = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # optuna formats it
    with _explained(folder, storage):
        for attempt in range(_ATTEMPTS):
            try:
                return RDBStorage(address, engine_kwargs=options)
            except AWAY as error:
                if "already exists" not in f"{error} {error.__cause__}" or attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.random())  # another worker was making the same table
    raise AssertionError


def open_study(folder: Path, storage: Storage | None = None) -> tuple[optuna.Study, Engine]:
    """The study of a comparison, made where there is none, and what its database is reached by.

    Raises:
        ScaloraError: as :func:`open_database`.
    """
    database = open_database(folder, storage)
    with _explained(folder, storage):
        study = optuna.create_study(study_name=_name(storage), storage=database, load_if_exists=True)
    return study, database.engine


def has_study(folder: Path, storage: Storage | None) -> bool:
    """Whether a comparison was begun; raises ScaloraError as :func:`open_database`."""
    if storage is None:
        return (folder / QUEUE).exists()
    database = open_database(folder, storage)
    with _explained(folder, storage):
        try:
            database.get_study_id_from_name(_name(storage))
        except KeyError:
            return False
    return True


def note(study: optuna.Study, key: str, value: Any) -> None:
    """Note what holds for a whole study, unless another worker has.

    An attribute of a study is overwritten by whoever comes last. Trials are numbered one after another, so the first
    that carries the key counts, also where two workers begin at one moment.
    """
    if noted(study, key) is None:
        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs={key: value}))


def noted(study: optuna.Study, key: str) -> Any:
    """What was noted first under a key; None where nothing was."""
    found = (each.user_attrs[key] for each in study.get_trials(deepcopy=False) if key in each.user_attrs)
    return next(found, study.user_attrs.get(key))  # where an earlier version noted it


def database_time(engine: Engine) -> float:
    """Seconds by the clock of the server, which is one for all machines; where there is no server, by this one's."""
    if (question := _CLOCKS.get(engine.dialect.name)) is None:
        return time.time()
    with engine.connect() as connection:
        return float(connection.scalar(text(question)) or 0.0)


def reason(error: BaseException, storage: Storage) -> str:
    """Why a database did not answer, in one line without the password."""
    cause = error if isinstance(error, SQLAlchemyError) else error.__cause__ or error
    said = " ".join(str(getattr(cause, "orig", None) or cause).split())
    password = storage.url.password
    return (said.replace(password, "***") if password else said)[:300]


@contextmanager
def _explained(folder: Path, storage: Storage | None) -> Iterator[None]:
    """Raises ScaloraError for what opening a database raises."""
    try:
        yield
    except (*AWAY, TypeError) as error:  # the latter is a driver's, of an option in the URL that it does not know
        if storage is None:
            raise ScaloraError(
                f"{(folder / QUEUE).resolve()} cannot be used ({type(error).__name__}): it is damaged or not yours to "
                f"write; delete it, and {RESULTS} continues the comparison"
            ) from error
        raise ScaloraError(
            f"--storage {_masked(storage.url)} cannot be used ({reason(error, storage)}): see that the server "
            "runs, and that user, password and database are right"
        ) from None
    except RuntimeError as error:  # optuna's, of tables that another version of it made
        raise ScaloraError(f"{storage or folder / QUEUE} cannot be used: {' '.join(str(error).split())}") from None


def _name(storage: Storage | None) -> str:
    """A study's name; with a prefix where others may keep studies of their own."""
    return "comparison" if storage is None else f"scalora: {storage.study}"


def _timeouts(url: URL) -> dict[str, int]:
    if url.get_driver_name() not in ("psycopg", "psycopg2"):
        return {}
    return {key: value for key, value in _TIMEOUTS.items() if key not in url.query}


def _masked(url: URL) -> str:
    """A URL without any password, wherever it says one."""
    hidden = {key: "***" for key in url.query if "pass" in key.lower() or key.lower() == "pwd"}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)

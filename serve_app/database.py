"""Opens a database, SQLite or PostgreSQL, for whoever keeps tables in it; knows none of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Table,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError

#: How long one who writes waits for another who does.
BUSY_SECONDS = 20


class StoreUnusable(Exception):
    """The database cannot be used; the message says why and what to do."""


def connect(url: str | URL) -> Engine:
    """An engine on `url`; of SQLite the file is made where there is none, for its owner alone.

    A transaction that is to write has the execution option `writes`. Raises StoreUnusable, or what SQLAlchemy
    raises.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreUnusable(
            "jobs_url must be an address such as postgresql://user:password@host/database"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite":
        return _sqlite(Path(str(parsed.database)))
    try:
        return create_engine(parsed, pool_pre_ping=True, pool_size=5, connect_args={"connect_timeout": 10})
    except ModuleNotFoundError:
        raise StoreUnusable(
            "jobs_url names PostgreSQL, and its driver is not installed: pip install 'zimage-turbo[postgres]'"
        ) from None


def opened(url: str | URL, make_tables: Callable[[Engine], None]) -> Engine:
    """An engine on `url` with the tables that `make_tables` makes. Raises what these two raise."""
    engine = connect(url)
    try:
        make_tables(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def version_found(connection: Connection, versions: Table, version: int, lock: int) -> int:
    """The version of the tables beside `versions`, which are made, as `version`, where there are none.

    Of several programs that begin at once one makes them: in PostgreSQL by the advisory `lock`, in SQLite
    because the transaction is one that writes.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({lock})"))
    if not inspect(connection).has_table(versions.name):
        versions.metadata.create_all(connection)
        connection.execute(versions.insert().values(version=version))
    found: int = connection.execute(select(versions.c.version)).scalar_one()
    return found


def _sqlite(file: Path) -> Engine:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Prompts and webhooks' secrets are nobody else's; the files beside it get the same mode.
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    url = URL.create("sqlite", database=str(file))
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # Python would begin transactions late, and a reader that begins to write fails at once.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine

"""The tables that jobs are kept in, and how a database of them is opened: SQLite or PostgreSQL.

Knows nothing of what a job goes through; that is the store's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError

#: Raised by one whenever a table changes; a database of another version is not touched.
VERSION = 2
#: How long one who writes waits for another who does.
BUSY_SECONDS = 20
#: PostgreSQL's advisory lock under which the tables are made; any number that is ours alone.
_MAKING_TABLES = 7_860_001

metadata = MetaData()
#: SQLite numbers rows by itself in an INTEGER alone.
_NUMBER = BigInteger().with_variant(Integer(), "sqlite")

#: What a job of a database of version 1 asks for, and most jobs.
GENERATIONS = "generations"

versions = Table("zimage_versions", metadata, Column("version", Integer, primary_key=True))

jobs = Table(
    "zimage_jobs",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("asked_by", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("operation", Text, nullable=False, server_default=GENERATIONS),
    Column("model", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("work", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("ended_at", Float),
    Column("not_before", Float, nullable=False, server_default="0"),
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("deaths", Integer, nullable=False, server_default="0"),
    Column("lease_owner", Text),
    Column("lease_until", Float),
    Column("step", Integer, nullable=False, server_default="0"),
    Column("steps", Integer, nullable=False, server_default="0"),
    Column("result", Text),
    Column("error", Text),
    Column("webhook_url", Text),
    Column("webhook_secret", Text),
    Index("zimage_jobs_by_status", "status", "asked_by", "number"),
    Index("zimage_jobs_by_owner", "owner", "number"),
    sqlite_autoincrement=True,
)

#: The files that a job is drawn from, until it has ended.
sources = Table(
    "zimage_job_sources",
    metadata,
    Column("job", Text, ForeignKey("zimage_jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("content", LargeBinary, nullable=False),
)

events = Table(
    "zimage_job_events",
    metadata,
    Column("number", _NUMBER, primary_key=True, autoincrement=True),
    Column("job", Text, ForeignKey("zimage_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("type", Text, nullable=False),
    Column("data", Text, nullable=False),
    Index("zimage_job_events_by_job", "job", "number"),
    sqlite_autoincrement=True,
)

keys = Table(
    "zimage_idempotency_keys",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("job", Text, ForeignKey("zimage_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("created_at", Float, nullable=False),
)

deliveries = Table(
    "zimage_webhook_deliveries",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job", Text, ForeignKey("zimage_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", Text),
    Column("body", Text, nullable=False),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("next_at", Float),
    Column("delivered_at", Float),
    Column("said", Text, nullable=False, server_default=""),
    Index("zimage_webhook_deliveries_by_time", "next_at"),
)


class StoreUnusable(Exception):
    """The database of jobs cannot be used; the message says why and what to do."""


def open_database(url: str | URL) -> Engine:
    """An engine on `url` with every table there. Raises StoreUnusable, or what SQLAlchemy raises."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise StoreUnusable(
            "jobs_url must be an address such as postgresql://user:password@host/database"
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite(Path(str(parsed.database)))
    else:
        try:
            engine = create_engine(
                parsed, pool_pre_ping=True, pool_size=5, connect_args={"connect_timeout": 10}
            )
        except ModuleNotFoundError:
            raise StoreUnusable(
                "jobs_url names PostgreSQL, and its driver is not installed: "
                "pip install 'zimage-turbo[postgres]'"
            ) from None
    try:
        _make_tables(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


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


def _make_tables(engine: Engine) -> None:
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_MAKING_TABLES})"))
        if not inspect(connection).has_table(versions.name):
            metadata.create_all(connection)
            connection.execute(versions.insert().values(version=VERSION))
        found = connection.execute(select(versions.c.version)).scalar_one()
        if found == 1:
            connection.execute(
                text(f"ALTER TABLE {jobs.name} ADD COLUMN operation TEXT NOT NULL DEFAULT '{GENERATIONS}'")
            )
            metadata.create_all(connection)
            connection.execute(versions.update().values(version=VERSION))
            found = VERSION
        if found != VERSION:
            raise StoreUnusable(
                f"The database of jobs has version {found}, and this program reads {VERSION}: use the "
                "program that made it, or set ZIMAGE_JOBS_URL or ZIMAGE_DATA_DIR to a new place"
            )

"""The tables that jobs are kept in, and how a database of them is opened: SQLite or PostgreSQL.

Knows nothing of what a job goes through; that is the store's.
"""

from __future__ import annotations

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
    text,
)

from serve_app.database import StoreUnusable, opened, version_found

#: Raised by one whenever a table changes; a database of another version is not touched.
VERSION = 2
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


def open_database(url: str | URL) -> Engine:
    """An engine on `url` with every table there. Raises StoreUnusable, or what SQLAlchemy raises."""
    return opened(url, _make_tables)


def _make_tables(engine: Engine) -> None:
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        found = version_found(connection, versions, VERSION, _MAKING_TABLES)
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

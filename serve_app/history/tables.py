"""The tables of the pictures that the page keeps, and how a database of them is opened.

Knows nothing of files and of who asks.
"""

from __future__ import annotations

from sqlalchemy import (
    URL,
    BigInteger,
    Column,
    Engine,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

from serve_app.database import StoreUnusable, opened, version_found

#: Raised by one whenever a table changes; a database of another version is not touched.
VERSION = 1
#: PostgreSQL's advisory lock under which the tables are made; any number that is ours alone.
_MAKING_TABLES = 7_860_002

metadata = MetaData()

versions = Table("zimage_history_versions", metadata, Column("version", Integer, primary_key=True))

pictures = Table(
    "zimage_history",
    metadata,
    Column("id", Text, primary_key=True),
    Column("place", Text, nullable=False),
    Column("owner", Text, nullable=False),
    # Microseconds since 1970; of one process no two are the same.
    Column("made_at", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("parameters", Text, nullable=False),
    Column("revised_prompt", Text, nullable=False),
    Column("words", Text, nullable=False),
    Index("zimage_history_by_owner", "place", "owner", "made_at"),
    Index("zimage_history_by_age", "place", "made_at", "size_bytes"),
)

thumbnails = Table(
    "zimage_history_thumbnails",
    metadata,
    Column("picture", Text, ForeignKey("zimage_history.id", ondelete="CASCADE"), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)


def open_database(url: str | URL) -> Engine:
    """An engine on `url` with every table there. Raises StoreUnusable, or what SQLAlchemy raises."""
    return opened(url, _make_tables)


def _make_tables(engine: Engine) -> None:
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        found = version_found(connection, versions, VERSION, _MAKING_TABLES)
        if found != VERSION:
            raise StoreUnusable(
                f"the database of the history has version {found}, and this program reads {VERSION}: use the "
                "program that made it, or set ZIMAGE_JOBS_URL or ZIMAGE_DATA_DIR to a new place"
            )

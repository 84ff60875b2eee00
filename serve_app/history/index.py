"""The rows of the pictures that are kept: each change is one transaction.

Blocks: call it from threads. Knows nothing of files; what it removes it names, so that their files can go.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, Select, delete, func, select

from serve_app.history.tables import pictures, thumbnails

#: Of a list of ids in one statement; databases bear some thousands.
AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class KeptPicture:
    """A picture of the history: what it was asked for with, and the prompt that was drawn."""

    id: str
    made_at: int
    size_bytes: int
    width: int
    height: int
    parameters: Mapping[str, Any]
    revised_prompt: str

    @property
    def created(self) -> int:
        """Seconds since 1970."""
        return self.made_at // 1_000_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is kept: so many pictures of each owner, so much in all, and each for so long."""

    pictures: int
    size_bytes: int
    seconds: float


_COLUMNS = [pictures.c[name] for name in KeptPicture.__dataclass_fields__]


def _kept(row: Row[Any]) -> KeptPicture:
    return KeptPicture(**{**row._mapping, "parameters": json.loads(row.parameters)})


class HistoryIndex:
    """The rows of one place of files; any number of processes may have one on the same database."""

    def __init__(self, engine: Engine, place: str) -> None:
        self._engine = engine
        self._place = place
        self._here = pictures.c.place == place

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._engine.connect() as connection, connection.begin():
            yield connection

    def add(self, picture: KeptPicture, owner: str, thumbnail: bytes) -> None:
        """From now on it is in its owner's history."""
        words = f"{picture.parameters.get('prompt', '')}\n{picture.revised_prompt}".casefold()
        with self._writing() as connection:
            connection.execute(
                pictures.insert().values(
                    id=picture.id,
                    place=self._place,
                    owner=owner,
                    made_at=picture.made_at,
                    size_bytes=picture.size_bytes,
                    width=picture.width,
                    height=picture.height,
                    # As ASCII it holds whatever a prompt may: a NUL, or half a character.
                    parameters=json.dumps(picture.parameters, allow_nan=False),
                    revised_prompt=storable(picture.revised_prompt),
                    words=storable(words),
                )
            )
            connection.execute(thumbnails.insert().values(picture=picture.id, content=thumbnail))

    def page(
        self, owner: str, before: tuple[int, str] | None, words: Collection[str], limit: int
    ) -> tuple[list[KeptPicture], bool]:
        """The newest first, those behind the time and id `before`, and whether there are more.

        Each of `words` stands somewhere in the prompt as it was asked for or drawn.
        """
        asked = self._of(owner)
        if before is not None:
            made_at, id = before
            asked = asked.where(
                (pictures.c.made_at < made_at) | ((pictures.c.made_at == made_at) & (pictures.c.id < id))
            )
        for word in words:
            asked = asked.where(pictures.c.words.contains(storable(word.casefold()), autoescape=True))
        asked = asked.order_by(pictures.c.made_at.desc(), pictures.c.id.desc()).limit(limit + 1)
        with self._reading() as connection:
            rows = connection.execute(asked).all()
        return [_kept(row) for row in rows[:limit]], len(rows) > limit

    def get(self, owner: str, id: str) -> KeptPicture | None:
        with self._reading() as connection:
            row = connection.execute(self._of(owner).where(pictures.c.id == id)).one_or_none()
        return None if row is None else _kept(row)

    def thumbnail(self, owner: str, id: str) -> bytes | None:
        asked = (
            select(thumbnails.c.content)
            .join(pictures, pictures.c.id == thumbnails.c.picture)
            .where(self._here & (pictures.c.owner == owner) & (pictures.c.id == id))
        )
        with self._reading() as connection:
            content = connection.execute(asked).scalar_one_or_none()
        return None if content is None else bytes(content)

    def _of(self, owner: str) -> Select[Any]:
        return select(*_COLUMNS).where(self._here & (pictures.c.owner == owner))

    def remove(self, owner: str, id: str | None = None) -> list[str]:
        """Remove one, or with None all, of an owner's; the ids that were there."""
        gone = delete(pictures).where(self._here & (pictures.c.owner == owner))
        if id is not None:
            gone = gone.where(pictures.c.id == id)
        with self._writing() as connection:
            return list(connection.execute(gone.returning(pictures.c.id)).scalars())

    def forget(self, ids: Sequence[str]) -> None:
        """Remove the rows of whomever they are: their files are gone already."""
        for first in range(0, len(ids), AT_ONCE):
            some = ids[first : first + AT_ONCE]
            with self._writing() as connection:
                connection.execute(delete(pictures).where(self._here & pictures.c.id.in_(some)))

    def ids(self) -> set[str]:
        """All there are, of every owner."""
        with self._reading() as connection:
            return set(connection.execute(select(pictures.c.id).where(self._here)).scalars())

    def evict(self, bounds: Bounds, now: float) -> list[str]:
        """Remove what is beyond the bounds, the oldest first; the ids whose files are to go."""
        with self._writing() as connection:
            too_old = pictures.c.made_at < int((now - bounds.seconds) * 1_000_000)
            # Also of places that are no more: nobody else would ever remove those.
            connection.execute(delete(pictures).where(~self._here & too_old))
            gone = self._gone(connection, too_old)
            for owner in self._with_more_than(connection, bounds.pictures):
                gone += self._gone(connection, self._beyond_number(owner, bounds.pictures))
            oldest = self._beyond_size(connection, bounds.size_bytes)
            for first in range(0, len(oldest), AT_ONCE):
                gone += self._gone(connection, pictures.c.id.in_(oldest[first : first + AT_ONCE]))
        return gone

    def _gone(self, connection: Connection, which: Any) -> list[str]:
        gone = delete(pictures).where(self._here & which).returning(pictures.c.id)
        return list(connection.execute(gone).scalars())

    def _with_more_than(self, connection: Connection, most: int) -> list[str]:
        owners = select(pictures.c.owner).where(self._here).group_by(pictures.c.owner)
        return list(connection.execute(owners.having(func.count() > most)).scalars())

    def _beyond_number(self, owner: str, most: int) -> Any:
        newest = (
            select(pictures.c.id)
            .where(self._here & (pictures.c.owner == owner))
            .order_by(pictures.c.made_at.desc(), pictures.c.id.desc())
            .limit(most)
        )
        return (pictures.c.owner == owner) & pictures.c.id.not_in(newest)

    def _beyond_size(self, connection: Connection, most_bytes: int) -> list[str]:
        sizes = select(func.coalesce(func.sum(pictures.c.size_bytes), 0)).where(self._here)
        too_many = int(connection.execute(sizes).scalar_one()) - most_bytes
        if too_many <= 0:
            return []
        oldest_first = (
            select(pictures.c.id, pictures.c.size_bytes)
            .where(self._here)
            .order_by(pictures.c.made_at, pictures.c.id)
        )
        beyond = []
        for id, size_bytes in connection.execute(oldest_first):
            if too_many <= 0:
                break
            beyond.append(id)
            too_many -= size_bytes
        return beyond


def storable(text: str) -> str:
    """The text without what no database takes: NUL, and halves of characters."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")

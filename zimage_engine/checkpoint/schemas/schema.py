"""What a schema is made of: checked settings in, named shapes out, and the way back; knows no model class."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from zimage_engine.errors import CheckpointDamaged, UnknownFamily

Shape = tuple[int, ...]

#: The largest real model here has about 2,000 tensors; a config that asks for more than this is damaged,
#: and is refused before it fills the memory.
MAX_TENSORS = 100_000
#: The longest side of a real tensor is a vocabulary of about 152,000 rows.
MAX_SIDE = 2**24
#: How a sentence about what tensors do not tell ends, for whoever has no better advice.
FETCH_CONFIG = "; fetch the component's config.json"
#: Real names stay below 120 characters.
_MAX_NAME_LENGTH = 500
_MAX_INDEX_DIGITS = 8
_REQUIRED = object()


class Settings:
    """A config read with suspicion: every value is checked for kind and size before anything is built of it.

    A key that is missing takes the class's own default. Each method raises CheckpointDamaged with a
    sentence that names the class and the key.
    """

    def __init__(self, class_name: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.class_name = class_name
        self._config = config
        self._defaults = defaults

    def value(self, key: str) -> Any:
        value = self._config.get(key, self._defaults.get(key, _REQUIRED))
        if value is _REQUIRED:
            raise CheckpointDamaged(
                f"the config of {self.class_name} has no '{key}', and the class has no default for it; "
                "fetch its config.json again"
            )
        return value

    def whole(self, key: str, minimum: int = 1) -> int:
        return self.checked_whole(key, self.value(key), minimum)

    def whole_or_none(self, key: str) -> int | None:
        return None if self.value(key) is None else self.whole(key)

    def wholes(self, key: str, length: int | None = None, minimum: int = 1) -> tuple[int, ...]:
        """A list of whole numbers; where `length` is given, one number stands for that many."""
        value = self.value(key)
        if length is not None and not isinstance(value, list | tuple):
            return (self.checked_whole(key, value, minimum),) * length
        return tuple(self.checked_whole(key, entry, minimum) for entry in self.entries(key, length))

    def entries(self, key: str, length: int | None = None) -> tuple[Any, ...]:
        value = self.value(key)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 100:
            raise self.refused(key, "must be a list of 1 to 100 entries", value)
        if length is not None and len(value) != length:
            raise self.refused(key, f"must have {length} entries, one for each block", value)
        return tuple(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.refused(key, "must be true or false", value)
        return value

    def word(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.refused(key, "must be a word", value)
        return value

    def only(self, key: str, allowed: Collection[Any]) -> Any:
        """The value, where it is one that this schema knows; raises UnknownFamily for any other."""
        return self.only_one_of(key, self.value(key), allowed)

    def only_one_of(self, key: str, value: Any, allowed: Collection[Any]) -> Any:
        """The same for one entry of the list at `key`."""
        # True == 1 in Python, so the type is compared too.
        if not any(type(value) is type(known) and value == known for known in allowed):
            raise UnknownFamily(
                f"the config of {self.class_name} has {key}={_short(value)}; "
                f"known here: {', '.join(repr(known) for known in allowed)}"
            )
        return value

    def checked_whole(self, key: str, value: Any, minimum: int = 1) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= MAX_SIDE:
            raise self.refused(key, f"must be a whole number from {minimum} to {MAX_SIDE}", value)
        return value

    def refused(self, key: str, demand: str, value: Any) -> CheckpointDamaged:
        return CheckpointDamaged(
            f"in the config of {self.class_name}, '{key}' {demand}, got {_short(value)}; "
            "fetch its config.json again"
        )


class TensorTable:
    """Collects the named shapes of one model, and refuses to grow beyond MAX_TENSORS."""

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.shapes: dict[str, Shape] = {}

    def add(self, name: str, *shape: int) -> None:
        if len(self.shapes) >= MAX_TENSORS:
            raise CheckpointDamaged(
                f"the config of {self.class_name} asks for more than {MAX_TENSORS} tensors, "
                "far beyond any real model; fetch its config.json again"
            )
        self.shapes[name] = shape

    def linear(self, name: str, out_size: int, in_size: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", out_size, in_size)
        if bias:
            self.add(f"{name}.bias", out_size)

    def conv(self, name: str, out_size: int, in_size: int, kernel: int) -> None:
        self.add(f"{name}.weight", out_size, in_size, kernel, kernel)
        self.add(f"{name}.bias", out_size)

    def norm(self, name: str, size: int) -> None:
        """A norm with weight and bias; one that has a weight alone is a plain `add`."""
        self.add(f"{name}.weight", size)
        self.add(f"{name}.bias", size)


class Measured:
    """The shapes that a file stores, asked one question at a time; what is absent raises an error."""

    def __init__(self, class_name: str, shapes: Mapping[str, Shape], constants: Mapping[str, Any]) -> None:
        if len(shapes) > MAX_TENSORS:
            raise CheckpointDamaged(
                f"{len(shapes)} tensors are more than any {class_name} has; at most {MAX_TENSORS} are read"
            )
        self.class_name = class_name
        self.shapes = shapes
        self.constants = constants
        self._counts = _numbered_children(shapes)

    def has(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str, sides: int, tells: str) -> Shape:
        """The shape of `name`, which must have so many `sides`; `tells` is the config key that it decides."""
        shape = self.shapes.get(name)
        if shape is None:
            raise self.untold(tells, f"tensor '{name}' is missing")
        if len(shape) != sides or not all(1 <= side <= MAX_SIDE for side in shape):
            raise self.untold(tells, f"tensor '{name}' should have {sides} sides, got shape {list(shape)}")
        return shape

    def count(self, prefix: str) -> int:
        """How many numbered children `prefix` has: the highest number met below it, plus one."""
        return self._counts.get(prefix, 0)

    def divided(self, whole: int, part: int, tells: str) -> int:
        if part < 1 or whole % part:
            raise self.untold(tells, f"{whole} is no multiple of {part}")
        return whole // part

    def untold(self, tells: str, because: str) -> CheckpointDamaged:
        return CheckpointDamaged(
            f"'{tells}' of {self.class_name} cannot be told from the tensors: {because}{FETCH_CONFIG}"
        )


@dataclass(frozen=True, slots=True)
class Schema:
    """One model class: its own defaults, its tensors, and what its tensors tell of its config.

    `stamp` is what config.json says of the class itself. `untold` lists the config keys that shapes cannot
    tell and whose default would be silently wrong: of each row, one key must come with the constants.
    `stored_prefix` stands before the names in published files, but not in the class's own state dict.
    """

    class_name: str
    stamp: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(repr=False)
    expect: Callable[[Settings, TensorTable], None] = field(repr=False)
    measure: Callable[[Measured], dict[str, Any]] = field(repr=False)
    untold: tuple[tuple[str, ...], ...]
    optional: frozenset[str] = frozenset()
    stored_prefix: str = ""


def _numbered_children(names: Collection[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        if len(name) > _MAX_NAME_LENGTH:
            continue
        pieces = name.split(".")
        for place, piece in enumerate(pieces):
            if piece.isascii() and piece.isdigit() and len(piece) <= _MAX_INDEX_DIGITS:
                prefix = ".".join(pieces[:place])
                counts[prefix] = max(counts.get(prefix, 0), int(piece) + 1)
    return counts


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        text = f"a list of {len(value)}: {list(value[:8])!r}"
    elif isinstance(value, int) and abs(value) > 10**30:  # turning digits into text is slow beyond thousands
        text = f"a whole number of {value.bit_length()} bits"
    else:
        text = repr(value) if not isinstance(value, str) else repr(value[:60])
    return text if len(text) <= 80 else f"{text[:77]}..."

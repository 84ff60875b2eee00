"""What was measured is remembered whole or not at all, and what ended a process is not tried for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_engine.speed.remembered import RememberedChoices, key_of_choice

KEY = key_of_choice({"device_name": "a card", "family": "z-image"})
FACTS = {"device_name": "a card"}

#: Ends without a word in the middle of a trial, as a driver's fault ends a process.
_DIES = """
import os, sys
from pathlib import Path
import zimage_engine.speed.remembered as module
from zimage_engine.speed.remembered import RememberedChoices
module.time.time = lambda: float(sys.argv[3])
with RememberedChoices(Path(sys.argv[1])).trying(sys.argv[2], "cuda_graphs"):
    os._exit(9)
"""


@pytest.fixture
def remembered(tmp_path: Path) -> RememberedChoices:
    return RememberedChoices(tmp_path / "levers")


def test_sizes_are_remembered_beside_one_another(remembered: RememberedChoices) -> None:
    assert remembered.recall(KEY) == {}
    assert remembered.remember(KEY, FACTS, 512, ("compiled",), {"speedup": 1.2})
    assert remembered.remember(KEY, FACTS, 1024, ("channels_last_vae", "compiled"), {"speedup": 1.3})
    assert remembered.remember(KEY, FACTS, 512, (), {"speedup": 1.0})
    assert remembered.recall(KEY) == {512: (), 1024: ("channels_last_vae", "compiled")}
    assert remembered.known()[0]["facts"] == FACTS
    assert remembered.forget() == 1
    assert remembered.recall(KEY) == {} and remembered.known() == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"device_name": "a"}, {"device_name": "b"}),
        ({"versions": (("torch", "2.13"),)}, {"versions": (("torch", "2.14"),)}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"quantize": None}, {"quantize": "int8"}),
    ],
)
def test_another_device_version_or_model_has_a_key_of_its_own(one: dict, other: dict) -> None:
    assert key_of_choice(one) == key_of_choice(dict(one)) != key_of_choice(other)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"sizes": 3}', '{"sizes": {"x": {"levers": ["compiled"]}}}']
)
def test_a_note_that_cannot_be_read_is_not_there(remembered: RememberedChoices, text: str) -> None:
    remembered.remember(KEY, FACTS, 512, ("compiled",), None)
    note = next(note for note in remembered._folder.iterdir())
    note.write_text(text, encoding="utf-8")
    assert remembered.recall(KEY) == {}
    assert remembered.remember(KEY, FACTS, 1024, ("compiled",), None)
    assert remembered.recall(KEY)[1024] == ("compiled",)


def test_unknown_names_are_left_out(remembered: RememberedChoices) -> None:
    remembered.remember(KEY, FACTS, 512, ("compiled", "a later version's"), None)
    assert remembered.recall(KEY) == {512: ("compiled",)}


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    remembered = RememberedChoices(tmp_path / "file" / "levers")
    assert not remembered.remember(KEY, FACTS, 512, ("compiled",), None)
    with remembered.trying(KEY, "compiled"):
        pass
    assert remembered.recall(KEY) == {} and remembered.forget() == 0


def test_what_ended_a_process_twice_is_left_out(remembered: RememberedChoices) -> None:
    remembered.remember(KEY, FACTS, 512, ("channels_last_vae", "cuda_graphs"), None)

    def dies(at: float) -> int:
        told = [str(remembered._folder), KEY, str(at)]
        return subprocess.run([sys.executable, "-c", _DIES, *told], check=False).returncode

    assert dies(1000.0) == 9
    assert remembered.barred(KEY) == frozenset()
    assert dies(1001.0) == 9  # two workers that began together
    assert remembered.barred(KEY) == frozenset()
    assert dies(2000.0) == 9
    assert remembered.barred(KEY) == {"cuda_graphs"}
    assert remembered.recall(KEY) == {512: ("channels_last_vae",)}
    assert remembered.barred(key_of_choice({"device_name": "another"})) == frozenset()
    with remembered.trying(KEY, "cuda_graphs"):
        pass
    assert remembered.barred(KEY) == frozenset()
    assert [dies(at) for at in (3000.0, 4000.0)] == [9, 9]
    remembered.forget()
    assert remembered.barred(KEY) == frozenset()


def test_a_death_on_another_machine_is_not_known_here(remembered: RememberedChoices) -> None:
    remembered.remember(KEY, FACTS, 512, ("compiled",), None)
    for number in range(3):
        note = {"lever": "compiled", "at": 1000.0 * number, "host": "another", "pid": 1, "began": 0.0}
        (remembered._folder / f"{KEY}.{number}.trying").write_text(json.dumps(note), encoding="utf-8")
    assert remembered.recall(KEY) == {512: ("compiled",)}


def test_a_trial_that_is_under_way_or_failed_with_an_error_bars_nothing(
    remembered: RememberedChoices,
) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), remembered.trying(KEY, "compiled"):
            raise RuntimeError("no compiler")
    with remembered.trying(KEY, "compiled"), remembered.trying(KEY, "compiled"):
        assert remembered.barred(KEY) == frozenset()
        notes = [json.loads(note.read_text()) for note in remembered._folder.glob("*.trying")]
        assert [note["lever"] for note in notes] == ["compiled"] * 2
    assert not list(remembered._folder.glob("*.trying"))

"""Named keys: how they are kept, what a file of them may look like, and how a server takes them."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from fastapi import Request
from typer.testing import CliRunner

from serve_app.cli import app as command
from serve_app.keys import (
    ADMIN,
    DRAW,
    READ,
    RECHECK_SECONDS,
    Allowance,
    KeyFileWrong,
    KeyRing,
    add_key,
    caller,
    change_key,
    digest_of,
    read_keys,
    remove_key,
)
from serve_app.queueing import Entry
from serve_app.settings import load_settings
from tests.serve_app.conftest import client_of
from tests.serve_app.test_gates import guarded

HASH = "sha256-" + digest_of("a key").hex()


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_file_has_the_hash_alone_and_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys"
    key = add_key(file, "alice", [DRAW])
    assert key not in file.read_text() and key.removeprefix("zit_") not in file.read_text()
    assert digest_of(key).hex() in file.read_text()
    assert mode_of(file) == 0o600
    (kept,) = read_keys(file)
    assert (kept.name, kept.scopes, kept.digest) == ("alice", {DRAW}, digest_of(key))
    assert key not in repr(kept)


def test_no_two_keys_are_alike_and_each_is_long(tmp_path: Path) -> None:
    keys = {add_key(tmp_path / "keys", f"caller-{number}", [READ]) for number in range(20)}
    assert len(keys) == 20
    assert min(map(len, keys)) >= 43


def test_keys_are_added_behind_a_last_line_without_an_end_and_comments_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n\nbob:read:{HASH}", encoding="utf-8")
    file.chmod(0o600)
    add_key(file, "alice", [DRAW, READ])
    add_key(file, "root", [ADMIN])
    remove_key(file, "bob")
    assert [key.name for key in read_keys(file)] == ["alice", "root"]
    assert file.read_text().startswith("# of the team\n")
    assert mode_of(file) == 0o600


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("", "there is no key in"),
        ("# none yet\n", "there is no key in"),
        ("alice:draw:zit_secret\n", "line 1 of .* is not of the form"),
        ("zit_secret\n", "line 1 of .* is not of the form"),
        (f"alice::{HASH}\n", "has the scope ''"),
        (f"alice:paint:{HASH}\n", "has the scope 'paint'; scopes are draw, read, admin"),
        (f"al ice:draw:{HASH}\n", "line 1 of .* is not of the form"),
        (f"alice:draw:{HASH}:\n", "line 1 of .* says behind its hash what is no share or limit"),
        (f"alice:draw:{HASH}:priority=urgent\n", "expected any of priority=high|normal|low"),
        (f"alice:draw:{HASH}:priority=high,priority=low\n", "or one twice"),
        (f"alice:draw:{HASH}:pictures_at_once=-1\n", "pictures_at_once=NUMBER"),
        (f"alice:draw:{HASH}:requests_a_minute=1e3\n", "requests_a_minute=NUMBER"),
        (f"alice:draw:{HASH}:weight=zit_secret\n", "what is no share or limit"),
        (f"alice:draw:{HASH}:priority=high:more\n", "line 1 of .* is not of the form"),
        (f"\nalice:draw:{HASH}\nalice:read:{HASH}\n", "line 3 of .* has the name alice a second time"),
    ],
)
def test_a_file_that_is_none_is_told_by_its_line_and_never_by_its_content(
    content: str, phrase: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(content, encoding="utf-8")
    file.chmod(0o600)
    with pytest.raises(KeyFileWrong, match=phrase) as refused:
        KeyRing(None, file)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620, 0o666])
def test_a_file_that_others_may_read_or_write_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "alice", [DRAW])
    file.chmod(mode)
    with pytest.raises(KeyFileWrong, match=rf"open to others \(mode {mode:04o}\); run: chmod 600"):
        read_keys(file)
    file.chmod(0o640)
    assert read_keys(file)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileWrong, match="No such file"):
        read_keys(tmp_path / "none")
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(KeyFileWrong, match="no text in UTF-8"):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize("name", ["", "a b", "../keys", "a:b", "a\nb", "ключ", "x" * 65, "api_key", "-a"])
def test_a_name_that_could_break_a_line_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileWrong):
        add_key(tmp_path / "keys", name, [DRAW])
    assert not (tmp_path / "keys").exists()


def test_a_name_is_given_once_and_the_last_key_stays(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    add_key(file, "alice", [DRAW])
    with pytest.raises(KeyFileWrong, match="already"):
        add_key(file, "alice", [READ])
    with pytest.raises(KeyFileWrong, match="only key"):
        remove_key(file, "alice")
    with pytest.raises(KeyFileWrong, match="there is no key bob"):
        remove_key(file, "bob")


def test_the_ring_knows_its_keys_and_the_settings_own_may_do_everything(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice, bob = add_key(file, "alice", [DRAW]), add_key(file, "bob", [READ])
    ring = KeyRing("sesame", file)
    owners = {key: ring.owner_of(key.encode()) for key in (alice, bob, "sesame", alice + "x", "", HASH)}
    assert {key: owner.name for key, owner in owners.items() if owner} == {
        alice: "alice",
        bob: "bob",
        "sesame": "api_key",
    }
    assert owners["sesame"] is not None and owners["sesame"].scopes == {DRAW, READ, ADMIN}
    assert ring and not KeyRing()


def test_a_key_is_revoked_and_taken_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    alice, bob = add_key(file, "alice", [DRAW]), add_key(file, "bob", [DRAW])
    ring = KeyRing(None, file)
    now = time.monotonic()
    monkeypatch.setattr("serve_app.keys.time.monotonic", lambda: now)
    remove_key(file, "alice")
    carol = add_key(file, "carol", [READ])
    assert ring.owner_of(alice.encode()) is not None, "read at most once a second"
    now += RECHECK_SECONDS + 0.1
    assert ring.owner_of(alice.encode()) is None
    assert ring.owner_of(carol.encode()) is not None
    file.chmod(0o644)
    now += RECHECK_SECONDS + 0.1
    with caplog.at_level("ERROR", logger="serve_app.keys"):
        assert ring.owner_of(bob.encode()) is not None
    assert "the keys read before stay in force" in caplog.text
    file.unlink()
    now += RECHECK_SECONDS + 0.1
    assert ring.owner_of(bob.encode()) is not None


def test_a_line_may_say_what_its_caller_gets_and_says_nothing_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"ann:draw,read:{HASH}:priority=high,pictures_at_once=4,requests_a_minute=60\n"
        f"bob:draw:{HASH}: requests_a_minute = 0 \n"
        f"cem:draw:{HASH}\n",
        encoding="utf-8",
    )
    file.chmod(0o600)
    ring, default = KeyRing("sesame", file), Entry("normal", 2, 30)
    assert {name: ring.entry_of(name, default) for name in ("ann", "bob", "cem", "api_key", "10.1.2.3")} == {
        "ann": Entry("high", 4, 60),
        "bob": Entry("normal", 2, 0),
        "cem": default,
        "api_key": default,
        "10.1.2.3": default,
    }
    assert [key.line() for key in read_keys(file)] == [
        f"ann:draw,read:{HASH}:priority=high,pictures_at_once=4,requests_a_minute=60",
        f"bob:draw:{HASH}:requests_a_minute=0",
        f"cem:draw:{HASH}",
    ]
    assert KeyRing().entry_of("10.1.2.3", default) == default


def test_what_a_caller_gets_is_changed_while_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "ann", [DRAW], Allowance("low", None, 60))
    add_key(file, "bob", [READ])
    file.write_text("# ours\n" + file.read_text())
    ring = KeyRing(None, file)
    now = time.monotonic()
    monkeypatch.setattr("serve_app.keys.time.monotonic", lambda: now)
    assert ring.entry_of("ann", Entry()) == Entry("low", 0, 60)
    change_key(file, "ann", Allowance("high", 3))
    now += RECHECK_SECONDS + 0.1
    assert ring.entry_of("ann", Entry()) == Entry("high", 3, 60)
    owner = ring.owner_of(key.encode())
    assert owner is not None and owner.scopes == {DRAW}
    assert file.read_text().startswith("# ours\nann:") and mode_of(file) == 0o600
    with pytest.raises(KeyFileWrong, match="there is no key cem"):
        change_key(file, "cem", Allowance("high"))


ROUTES = {
    ("POST", "/v1/echo"): DRAW,
    ("GET", "/"): DRAW,
    ("GET", "/events"): DRAW,
    ("GET", "/metrics"): READ,
    ("GET", "/v1/models"): READ,
    ("GET", "/v1/models/tiny"): READ,
    ("GET", "/openapi.json"): READ,
    ("GET", "/-/settings"): READ,
    ("POST", "/-/settings"): ADMIN,
    ("DELETE", "/-/settings"): ADMIN,
}


@pytest.mark.parametrize("scope", [DRAW, READ, ADMIN])
async def test_a_key_opens_what_its_scopes_name_and_nothing_else(scope: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "alice", [scope])
    app = guarded(load_settings(api_keys_file=file))
    async with client_of(app) as client:
        for (method, path), needed in ROUTES.items():
            answer = await client.request(method, path, headers=bearer(key))
            assert (answer.status_code == 403) == (scope != needed), (method, path)
            assert answer.status_code != 401, (method, path)
            if answer.status_code == 403:
                error = answer.json()["error"]
                assert error["code"] == "insufficient_scope"
                assert f"The key alice may {scope}; this needs the scope {needed}" in error["message"]
        assert (await client.get("/metrics")).status_code == 401


async def test_metrics_can_be_left_open_and_nothing_else_is() -> None:
    app = guarded(load_settings(api_key="sesame", metrics_without_key=True))
    async with client_of(app) as client:
        assert (await client.get("/metrics")).status_code == 200
        for path in ("/", "/metrics/", "/metrics/../", "/v1/models"):
            assert (await client.get(path)).status_code == 401, path


async def test_the_name_of_the_caller_is_known_behind_the_gates(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "alice", [DRAW])
    app = guarded(load_settings(api_key="sesame", api_keys_file=file))

    @app.get("/who")
    async def who(request: Request) -> str:
        assert request.state.caller == caller.get()
        return caller.get()

    async with client_of(app) as client:
        assert (await client.get("/who", headers=bearer(key))).json() == "alice"
        assert (await client.get("/who", headers=bearer("sesame"))).json() == "api_key"
    async with client_of(guarded(load_settings())) as client:
        await client.get("/metrics", headers=bearer(key))
        assert caller.get() == ""


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(command, ["keys", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_a_key_once_and_lists_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    code, key, _ = run("add", "alice", "--scope", "draw", "--file", str(file))
    assert code == 0 and key.startswith("zit_")
    monkeypatch.setenv("ZIMAGE_API_KEYS_FILE", str(file))
    assert run("add", "bob")[0] == 0
    code, listed, _ = run("ls")
    assert (code, listed) == (0, "alice  draw\nbob  draw,read\n")
    assert run("remove", "alice")[0] == 0
    assert [kept.name for kept in read_keys(file)] == ["bob"]


def test_the_command_says_and_changes_what_a_caller_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZIMAGE_API_KEYS_FILE", str(tmp_path / "keys"))
    assert run("add", "ann", "--priority", "high", "--pictures-at-once", "4")[0] == 0
    assert run("add", "bob")[0] == 0
    assert run("set", "ann", "--requests-a-minute", "60")[0] == 0
    assert run("ls")[1] == (
        "ann  draw,read  priority=high pictures_at_once=4 requests_a_minute=60\nbob  draw,read\n"
    )
    for wrong, phrase in {
        ("set", "ann"): "what is to change?",
        ("set", "cem", "--priority", "low"): "there is no key cem",
        ("set", "ann", "--priority", "urgent"): "urgent",
        ("add", "cem", "--pictures-at-once", "-1"): "--pictures-at-once",
    }.items():
        code, _, told = run(*wrong)
        assert code == 2 and phrase in told, wrong


def test_the_command_tells_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    code, _, told = run("add", "alice", "--scope", "paint", "--file", str(file))
    assert code == 2 and "scopes are draw, read, admin" in told
    code, _, told = run("ls", "--file", str(file))
    assert code == 2 and "zimage-turbo keys add NAME" in told
    assert run("add", "alice")[0] == 2


def test_an_open_address_is_fine_with_a_file_of_keys_too(tmp_path: Path) -> None:
    settings = load_settings(host="0.0.0.0", api_keys_file=tmp_path / "keys")
    assert settings.api_keys_file == tmp_path / "keys"
    assert os.fspath(tmp_path / "keys") in str(settings.api_keys_file)

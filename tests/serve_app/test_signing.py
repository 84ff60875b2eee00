"""Signed pictures: who signed is told, a changed byte is found, what cannot sign is refused at the start."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from c2pa import Builder, Context, Reader
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from fastapi import FastAPI
from PIL import Image
from ray import serve
from typer.testing import CliRunner

from serve_app import cli
from serve_app.app import _check_files, _with_absolute_paths
from serve_app.error_mapping import answer_for
from serve_app.finishing import Finisher
from serve_app.history.conversion import as_file
from serve_app.image_codec import (
    FileFormat,
    ImageEncoding,
    PictureFacts,
    encode,
    read_parameters,
    read_receipt,
)
from serve_app.ingress import build_asgi_app
from serve_app.metrics import ServerMetrics
from serve_app.reproduction import compare, read_given
from serve_app.service import ImageService
from serve_app.settings import SettingsError, load_settings
from serve_app.signing import RECEIPT_LABEL, Signing, SigningFailed, is_signed, read_signature
from serve_app.worker import ImageWorker
from tests.serve_app.certificates import (
    Credentials,
    edwards,
    p384,
    rsa2048,
    write_credentials,
)
from tests.serve_app.conftest import client_of, loaded_worker
from zimage_engine import Engine
from zimage_engine.errors import InvalidRequest
from zimage_engine.types import GenerationRequest, SourcePicture

RECEIPT: dict[str, Any] = {
    "receipt": 1,
    "seed": 5,
    "prompt": "a 圆",
    "guard": {"trips": []},
    "revision": None,
}
FACTS = PictureFacts("a 圆", "", 5, 8, 1.8, 96, 64, "demo", "flow", receipt=RECEIPT)
REQUEST = GenerationRequest(prompt="a red circle", width=64, height=64, num_inference_steps=2, seed=5)
FORMATS: tuple[FileFormat, ...] = ("png", "jpeg", "webp")


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return write_credentials(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def signing(credentials: Credentials) -> Signing:
    return Signing.load(credentials.certificate, credentials.key)


def packed(file_format: FileFormat = "png", facts: PictureFacts = FACTS) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (facts.height, facts.width, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), ImageEncoding(file_format, 80), facts)


def pixels(picture: bytes) -> bytes:
    return Image.open(io.BytesIO(picture)).convert("RGB").tobytes()


def manifest_of(picture: bytes) -> dict[str, Any]:
    """What another program sees in it."""
    media_type = {b"\x89P": "image/png", b"\xff\xd8": "image/jpeg", b"RI": "image/webp"}[picture[:2]]
    facts: dict[str, Any] = json.loads(Reader(media_type, io.BytesIO(picture), context=Context()).json())
    manifest: dict[str, Any] = facts["manifests"][facts["active_manifest"]]
    return manifest


def assertions_of(picture: bytes) -> dict[str, Any]:
    return {each["label"]: each["data"] for each in manifest_of(picture)["assertions"]}


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_signed_picture_keeps_its_pixels_and_its_text_and_tells_who_signed(
    signing: Signing, credentials: Credentials, file_format: FileFormat
) -> None:
    plain = packed(file_format)
    picture = signing.signed(plain, read_receipt(plain))
    assert is_signed(picture) and not is_signed(plain) and read_signature(plain) is None
    assert pixels(picture) == pixels(plain)
    assert read_parameters(picture) == read_parameters(plain)
    assert read_receipt(picture) == read_receipt(plain) is not None
    told = read_signature(picture)
    assert told is not None and told.valid and told.trusted is None and told.faults == ()
    assert (told.signer, told.organisation, told.algorithm) == ("Example Painter", "Example Studio", "es256")
    assert told.program.startswith("zimage-turbo ")
    vouched = read_signature(picture, credentials.authority)
    assert vouched is not None and vouched.valid and vouched.trusted


@pytest.mark.parametrize("file_format", FORMATS)
def test_one_changed_byte_anywhere_is_found(signing: Signing, file_format: FileFormat) -> None:
    plain = packed(file_format)
    picture = signing.signed(plain, read_receipt(plain))
    text = picture.index(b'"seed":5' if file_format != "webp" else b"ICMT" if b"ICMT" in picture else b"seed")
    for place in (len(picture) // 2, len(picture) - 30, text + 2):
        changed = bytearray(picture)
        changed[place] ^= 1
        told = read_signature(bytes(changed))
        assert told is not None and not told.valid and told.faults, place
        assert "broken" in told.sentence and "changed" in told.sentence


def test_anothers_authority_is_not_believed(signing: Signing, tmp_path: Path) -> None:
    other = write_credentials(tmp_path).authority
    told = read_signature(signing.signed(packed(), RECEIPT), other)
    assert told is not None and told.valid and told.trusted is False
    assert "none of the given authorities" in told.sentence


def test_a_name_with_a_terminals_commands_in_it_is_told_without_them(tmp_path: Path) -> None:
    made = write_credentials(tmp_path, name="Painter\x1b[2J\nsigned by nobody")
    told = read_signature(Signing.load(made.certificate, made.key).signed(packed(), RECEIPT))
    assert told is not None and told.signer == "Painter?[2J?signed by nobody"
    assert told.sentence.isprintable()


def test_the_manifest_says_that_a_model_drew_it_and_holds_the_receipt(signing: Signing) -> None:
    assertions = assertions_of(signing.signed(packed(), RECEIPT))
    (action,) = assertions["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert assertions[RECEIPT_LABEL] == RECEIPT


def test_an_edit_is_told_as_one_of_a_source_and_a_watermark_as_put_in(signing: Signing) -> None:
    receipt = {**RECEIPT, "edit": {"strength": 0.5}, "watermark": "studio"}
    picture = signing.signed(packed(), receipt)
    actions = assertions_of(picture)["c2pa.actions.v2"]["actions"]
    assert [each["action"] for each in actions] == ["c2pa.opened", "c2pa.edited", "c2pa.watermarked.unbound"]
    assert actions[1]["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert [each["relationship"] for each in manifest_of(picture)["ingredients"]] == ["parentOf"]
    told = read_signature(picture)
    assert told is not None and told.valid, told


def test_several_threads_sign_at_once(signing: Signing) -> None:
    plain = packed()
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda _: signing.signed(plain, RECEIPT), range(24)))
    assert all((told := read_signature(each)) is not None and told.valid for each in pictures)


@pytest.mark.parametrize(
    ("key", "algorithm", "told"),
    [
        (p384, None, "es384"),
        (rsa2048, None, "ps256"),
        (rsa2048, "ps384", "ps384"),
        (edwards, None, "ed25519"),
    ],
    ids=["P-384", "RSA", "RSA as asked", "Ed25519"],
)
def test_the_algorithm_goes_with_the_key(
    tmp_path: Path, key: Callable[[], Any], algorithm: str | None, told: str
) -> None:
    made = write_credentials(tmp_path, key())
    picture = Signing.load(made.certificate, made.key, algorithm).signed(packed(), RECEIPT)
    signature = read_signature(picture)
    assert signature is not None and signature.valid and signature.algorithm == told


def test_a_key_in_openssls_older_form_is_taken(tmp_path: Path) -> None:
    made = write_credentials(tmp_path, form=serialization.PrivateFormat.TraditionalOpenSSL)
    assert b"BEGIN EC PRIVATE KEY" in made.key.read_bytes()
    assert Signing.load(made.certificate, made.key).signed(packed(), RECEIPT)


def _missing(folder: Path) -> Credentials:
    made = write_credentials(folder)
    made.key.unlink()
    return made


def _open_to_others(folder: Path) -> Credentials:
    made = write_credentials(folder)
    made.key.chmod(0o644)
    return made


def _with(folder: Path, name: str, content: bytes) -> Credentials:
    made = write_credentials(folder)
    getattr(made, name).write_bytes(content)
    return made


def _of_another(folder: Path) -> Credentials:
    return replace(write_credentials(folder), key=write_credentials(folder / "other").key)


def _authority_first(folder: Path) -> Credentials:
    made = write_credentials(folder)
    first, second = made.certificate.read_text().split("-----END CERTIFICATE-----\n")[:2]
    end = "-----END CERTIFICATE-----\n"
    made.certificate.write_text(second + end + first + end)
    return made


_WRONG: dict[str, tuple[Callable[[Path], Credentials], str]] = {
    "no key": (_missing, "c2pa_key names .*key.pem, which cannot be read: No such file"),
    "open to others": (_open_to_others, r"open to others \(mode 0644\); run: chmod 600"),
    "no key in it": (lambda folder: _with(folder, "key", b"hello"), "private key in PEM, and .* has none"),
    "no certificate in it": (
        lambda folder: _with(folder, "certificate", b"hello"),
        "chain of certificates in PEM.* has none",
    ),
    "another's key": (_of_another, "is not that of the key in"),
    "authority first": (_authority_first, "is not that of the key in .*; the signer's own comes first"),
    "ended": (lambda folder: write_credentials(folder, ended=True), "holds from .* to .* UTC.*renew it"),
    "with a password": (lambda folder: write_credentials(folder, password=b"x"), "has a password"),
    "for web servers": (
        lambda folder: write_credentials(folder, usage=ExtendedKeyUsageOID.SERVER_AUTH),
        "cannot sign pictures .*emailProtection",
    ),
}


@pytest.mark.parametrize("name", _WRONG)
def test_what_cannot_sign_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    make, sentence = _WRONG[name]
    made = make(tmp_path)
    settings = load_settings(device="cpu", **made.as_settings())
    with pytest.raises(InvalidRequest, match=sentence):
        Finisher.of(settings)
    with pytest.raises(InvalidRequest, match=sentence):
        _check_files(settings)


async def test_a_worker_that_cannot_sign_does_not_start(tmp_path: Path) -> None:
    made = _open_to_others(tmp_path)
    # Of a model that is not there nothing is said: signing is looked at first.
    with pytest.raises(InvalidRequest, match="open to others"):
        await loaded_worker(load_settings(model="/nowhere", device="cpu", **made.as_settings()))


def test_an_algorithm_of_another_key_is_refused(credentials: Credentials) -> None:
    with pytest.raises(InvalidRequest, match=r"c2pa_algorithm must be es256 for the key in .*, got ps256"):
        Signing.load(credentials.certificate, credentials.key, "ps256")


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"c2pa_key": "key.pem"}, "go together, and c2pa_certificate is missing"),
        ({"c2pa_certificate": "chain.pem"}, "go together, and c2pa_key is missing"),
        ({"c2pa_timestamp_url": "http://time.example.org"}, "do nothing without"),
        (
            {"c2pa_certificate": "a", "c2pa_key": "b", "c2pa_timestamp_url": "time"},
            "c2pa_timestamp_url must be an authority's address",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(chosen: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        load_settings(**chosen)


def test_paths_hold_in_a_workers_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = _with_absolute_paths(load_settings(c2pa_certificate="chain.pem", c2pa_key="key.pem"))
    assert (settings.c2pa_certificate, settings.c2pa_key) == (tmp_path / "chain.pem", tmp_path / "key.pem")
    assert load_settings(c2pa_certificate="", c2pa_key="").c2pa_key is None


@pytest.fixture
def listener() -> Iterator[tuple[str, list[bytes]]]:
    """An address, and what was sent there; nothing is answered but the end."""
    heard: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_nothing_is_fetched_to_read_a_signature(
    credentials: Credentials, listener: tuple[str, list[bytes]]
) -> None:
    address, heard = listener
    signing = Signing.load(credentials.certificate, credentials.key)
    builder = Builder('{"assertions": []}', context=signing._context)
    builder.set_no_embed()
    builder.set_remote_url(f"{address}/manifest.c2pa")
    file = io.BytesIO()
    builder.sign("image/png", io.BytesIO(packed()), file)
    assert address.encode() in file.getvalue()
    assert read_signature(file.getvalue()) is None
    assert heard == []


def test_a_time_authority_that_fails_makes_signing_fail_and_not_the_start(
    credentials: Credentials, listener: tuple[str, list[bytes]]
) -> None:
    address, heard = listener
    signing = Signing.load(credentials.certificate, credentials.key, timestamp_url=f"{address}/tsa")
    assert heard == []
    with pytest.raises(
        SigningFailed, match="drawn and could not be signed, so it is not given out"
    ) as failed:
        signing.signed(packed(), RECEIPT)
    assert heard
    answer = answer_for(failed.value)
    assert (answer.status, answer.code) == (500, "signing_failed")
    assert "not given out" in answer.message and "incident" in answer.message


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, "cpu", threads=1)


@pytest.mark.parametrize(
    "source", [None, SourcePicture(64, 64, bytes(range(192)) * 64)], ids=["drawn", "edit"]
)
def test_a_signed_picture_is_drawn_again_as_it_was(
    engine: Engine, signing: Signing, source: SourcePicture | None
) -> None:
    request = replace(REQUEST, image=source, strength=None if source is None else 0.6)
    finisher = Finisher(signing)
    (picture,), _ = finisher.finished(engine.generate(request), ImageEncoding("png"))
    told = read_signature(picture)
    assert told is not None and told.valid
    given = read_given(picture)
    (again,), _ = Finisher().finished(engine.generate(given.request(source)), ImageEncoding("png"))
    came_of_it = compare(given, again)
    assert (came_of_it.identical, came_of_it.differences) == (True, ()), came_of_it.sentence


def signing_server(name: str, **changed: Any) -> FastAPI:
    """A server with a worker of its own, in this process."""
    chosen = load_settings(device="cpu", cpu_threads=1, ui=False, **changed)
    deployment = serve.deployment(ImageWorker, name=f"Worker-{name}").bind(chosen)
    handle = serve.run(deployment, name=name, route_prefix=f"/{name}", _local_testing_mode=True)
    return build_asgi_app(ImageService(handle, ServerMetrics("test"), chosen), chosen)


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


async def test_every_way_to_a_picture_gives_a_signed_one(
    tiny_model: Path, credentials: Credentials, tmp_path: Path
) -> None:
    app = signing_server(
        "signed",
        model=str(tiny_model),
        data_dir=str(tmp_path),
        **credentials.as_settings(),
    )
    wire = {"prompt": "a red circle", "size": "128x128", "num_inference_steps": 1, "seed": 3}
    files: dict[str, bytes] = {}
    async with client_of(app) as client, app.router.lifespan_context(app):
        for file_format in FORMATS:
            asked = {**wire, "output_format": file_format, "receipt": True}
            drawn = await client.post("/v1/images/generations", json=asked)
            assert drawn.status_code == 200, drawn.text
            answer = drawn.json()["data"][0]
            files[file_format] = base64.b64decode(answer["b64_json"])
        answer = await client.post("/v1/images/generations", json={**wire, "response_format": "url"})
        files["url"] = (await client.get(answer.json()["data"][0]["url"])).content
        stream = await client.post(
            "/v1/images/generations",
            json={**wire, "num_inference_steps": 4, "stream": True, "partial_images": 1},
        )
        *partial, last = _events(stream.text)
        files["stream"] = base64.b64decode(last["b64_json"])
        previews = [base64.b64decode(each["b64_json"]) for each in partial if "b64_json" in each]
        assert previews and not any(is_signed(each) for each in previews)
        job = await client.post("/v1/images/jobs", json=wire)
        files["job"] = await _picture_of(client, job)
        again = await client.post(
            "/v1/images/reproduce", json={"image": base64.b64encode(files["png"]).decode()}
        )
        files["again"] = base64.b64decode(again.json()["b64_json"])
    assert (again.json()["identical"], again.json()["differences"]) == (True, []), again.text
    for way, picture in files.items():
        told = read_signature(picture, credentials.authority)
        assert told is not None and told.valid and told.trusted, way
        assert assertions_of(picture)[RECEIPT_LABEL] == read_receipt(picture), way


async def _picture_of(client: httpx.AsyncClient, accepted: httpx.Response) -> bytes:
    assert accepted.status_code == 202, accepted.text
    where = accepted.headers["location"]
    stream = await client.get(f"{where}/events")
    assert stream.status_code == 200, stream.text
    job = (await client.get(where)).json()
    assert job["status"] == "done", job
    picture = job["result"]["data"][0]
    if picture.get("url"):
        return (await client.get(picture["url"])).content
    return base64.b64decode(picture["b64_json"])


async def test_a_picture_that_cannot_be_signed_is_not_given_out(
    tiny_model: Path, credentials: Credentials, listener: tuple[str, list[bytes]], tmp_path: Path
) -> None:
    app = signing_server(
        "unsigned",
        model=str(tiny_model),
        data_dir=str(tmp_path),
        c2pa_timestamp_url=listener[0],
        **credentials.as_settings(),
    )
    async with client_of(app) as client:
        answer = await client.post(
            "/v1/images/generations", json={"prompt": "a", "size": "64x64", "num_inference_steps": 1}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "signing_failed"), answer.text
    assert "not given out" in answer.json()["error"]["message"]
    assert str(credentials.key) not in answer.text and "127.0.0.1" not in answer.text


def test_the_command_tells_who_signed_and_finds_what_was_changed(
    signing: Signing, credentials: Credentials, tmp_path: Path
) -> None:
    file = tmp_path / "picture.jpg"
    plain = packed("jpeg")
    picture = signing.signed(plain, read_receipt(plain))
    file.write_bytes(picture)
    authority = tmp_path / "root.pem"
    authority.write_text(credentials.authority)
    run = CliRunner()
    told = run.invoke(cli.app, ["inspect", str(file)])
    assert told.exit_code == 0, told.output
    assert "signed by Example Painter of Example Studio" in told.output and "unchanged since" in told.output
    assert "Seed: 5" in told.output and "watermark: none" in told.output
    vouched = run.invoke(cli.app, ["inspect", str(file), "--trust", str(authority), "--json"])
    facts = json.loads(vouched.output)
    assert facts["signature"]["valid"] and facts["signature"]["trusted"] and facts["receipt"]["seed"] == 5
    file.write_bytes(picture[:-40] + bytes([picture[-40] ^ 1]) + picture[-39:])
    changed = run.invoke(cli.app, ["inspect", str(file), "--json"])
    assert json.loads(changed.output)["signature"]["faults"] == ["assertion.dataHash.mismatch"]
    assert changed.exit_code == 1, changed.output
    file.write_bytes(plain)
    assert "signature: none" in run.invoke(cli.app, ["inspect", str(file)]).output
    refused = run.invoke(cli.app, ["inspect", str(file), "--trust", str(file)])
    assert refused.exit_code == 1 and "cannot be read" in refused.output


def test_the_batch_signs_and_reproduce_tells_it(
    tiny_model: Path, credentials: Credentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in credentials.as_settings().items():
        monkeypatch.setenv(f"ZIMAGE_{name.upper()}", value)
    prompts, folder = tmp_path / "prompts.jsonl", tmp_path / "pictures"
    prompts.write_text('{"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}\n')
    options = ["--model", str(tiny_model), "--device", "cpu", "--threads", "1"]
    done = CliRunner().invoke(cli.app, ["batch", str(prompts), "-o", str(folder), *options])
    assert done.exit_code == 0, done.output
    (file,) = folder.glob("*.png")
    monkeypatch.undo()
    again = CliRunner().invoke(cli.app, ["reproduce", str(file), *options])
    assert again.exit_code == 0, again.output
    assert "identical" in again.output and "signed by Example Painter" in again.output


def test_what_the_history_makes_of_a_signed_picture_is_signed(engine: Engine, signing: Signing) -> None:
    from serve_app.routes.history import _converted

    (picture,), _ = Finisher(signing).finished(engine.generate(REQUEST), ImageEncoding("png"))
    told = read_signature(_converted(picture, "webp", 90, signing))
    assert told is not None and told.valid
    assert read_signature(as_file(picture, "webp", 90)) is None

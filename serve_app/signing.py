"""Signs the files of finished pictures as C2PA asks, and reads who has signed one.

C2PA's manifest stands beside the pixels and the text of a file, and changes neither. All is done by
`c2pa-python` (extra c2pa), which reaches the network for nothing but a timestamp, where an authority is
named. Knows no HTTP, no Ray and no engine.
"""

from __future__ import annotations

import importlib.util
import io
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage_engine.errors import InvalidRequest

if TYPE_CHECKING:
    from c2pa import Context
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.x509 import Certificate

#: The label that our receipt has among a manifest's assertions.
RECEIPT_LABEL = "org.zimage-turbo.receipt"
INSTALL = "pip install 'zimage-turbo[c2pa]'"

#: IPTC's words for where pixels come from (http://cv.iptc.org/newscodes/digitalsourcetype).
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_DRAWN, _DRAWN_INTO_A_PICTURE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
_PROGRAM = "zimage-turbo"
_OPEN_TO_OTHERS = stat.S_IRWXO
_MEDIA_TYPES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"RIFF": "image/webp",
}
#: What the library's own settings are: it asks nobody about a certificate and fetches no manifest.
_OFFLINE: Mapping[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    "builder": {"thumbnail": {"enabled": False}},
}
#: Said of each certificate that nobody we know vouches for; it is told as `trusted`, and no fault.
_UNTRUSTED = "signingCredential.untrusted"
_WANTED = (
    "a signer's certificate is not self-signed and no authority's, and has the key usage digitalSignature "
    "and the extended key usage emailProtection or documentSigning"
)


class SigningFailed(Exception):
    """A picture that was to be signed could not be, and is not given out."""


@dataclass(frozen=True, slots=True)
class Signature:
    """Who has signed a picture, and whether it is still what was signed.

    `trusted` is None where nobody was named whose certificates are believed. `faults` are C2PA's codes.
    """

    valid: bool
    trusted: bool | None
    signer: str
    organisation: str
    algorithm: str
    program: str
    signed_at: str
    faults: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What is to be said of it, for a person."""
        signer = " of ".join(part for part in (self.signer, self.organisation) if part) or "an unnamed signer"
        if not self.valid:
            return f"the signature is broken: the picture or what is told of it was changed ({self._told})"
        vouched = {
            None: "nobody was asked who vouches for the certificate",
            False: "none of the given authorities vouches for the certificate",
            True: "a given authority vouches for the certificate",
        }[self.trusted]
        when = f" at {self.signed_at}" if self.signed_at else ""
        return f"signed by {signer}{when} with {self.program}, and unchanged since; {vouched}"

    @property
    def _told(self) -> str:
        return ", ".join(self.faults) or "no reason told"


class Signing:
    """A certificate and its key, read once, that pictures are signed with. May be used by several threads."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @classmethod
    def load(
        cls, certificate: Path, key: Path, algorithm: str | None = None, timestamp_url: str | None = None
    ) -> Signing:
        """Read and try them. Raises InvalidRequest, named as the settings are, for what cannot sign.

        `certificate` holds the signer's certificate first, then those that vouch for it; `algorithm` None:
        the one that goes with the key. Of `timestamp_url` nothing is asked before the first picture.
        """
        chain = _read(certificate, "c2pa_certificate")
        pem = _read(key, "c2pa_key")
        if key.stat().st_mode & _OPEN_TO_OTHERS:
            raise InvalidRequest(
                f"setting c2pa_key: {key} is open to others (mode {stat.S_IMODE(key.stat().st_mode):04o}); "
                f"run: chmod 600 {key}",
                "c2pa_key",
            )
        signer = _signers_certificate(chain, certificate)
        private = _private_key(pem, key)
        _check_pair(signer, private, certificate, key)
        chosen = _algorithm(private, algorithm, key)
        signing = cls(_context(chain, private, chosen, None))
        signing._try(certificate)
        return signing if timestamp_url is None else cls(_context(chain, private, chosen, timestamp_url))

    def signed(self, picture: bytes, receipt: Mapping[str, Any] | None) -> bytes:
        """The file with its manifest, which has the receipt in it. Raises SigningFailed."""
        from c2pa import Builder, C2paError

        file = io.BytesIO()
        try:
            with Builder(json.dumps(_manifest(receipt)), context=self._context) as builder:
                builder.sign(_media_type(picture), io.BytesIO(picture), file)
        except C2paError as error:
            raise SigningFailed(
                f"The picture was drawn and could not be signed, so it is not given out: {_reason(error)}"
            ) from error
        return file.getvalue()

    def _try(self, certificate: Path) -> None:
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "png")
        try:
            signature = read_signature(self.signed(file.getvalue(), None))
        except SigningFailed as failed:
            raise InvalidRequest(
                f"setting c2pa_certificate: {certificate} cannot sign pictures "
                f"({_reason(failed.__cause__)}); {_WANTED}",
                "c2pa_certificate",
            ) from failed
        assert signature is not None
        if not signature.valid:
            raise InvalidRequest(
                f"setting c2pa_certificate: what {certificate} has signed cannot be verified "
                f"({', '.join(signature.faults)}); {_WANTED}",
                "c2pa_certificate",
            )


def can_sign() -> bool:
    """Whether the library that signs and verifies is installed."""
    return importlib.util.find_spec("c2pa") is not None


def is_signed(picture: bytes) -> bool:
    """Whether the file seems to have a C2PA manifest; for those who cannot verify it."""
    return b"jumbc2pa" in picture or b"urn:c2pa:" in picture


def read_signature(picture: bytes, authorities: str | None = None) -> Signature | None:
    """Who has signed the file of a picture, None for a file without a manifest in it.

    `authorities`: certificates in PEM that are believed. Reaches no network: of a manifest that is kept
    elsewhere nothing is said. Raises ModuleNotFoundError where c2pa-python is not installed.
    """
    from c2pa import C2paError, Context, Reader

    told = dict(_OFFLINE)
    if authorities is not None:
        told = {**told, "trust": {"user_anchors": authorities}}
    try:
        with (
            Context.from_dict(told) as context,
            Reader(_media_type(picture), io.BytesIO(picture), context=context) as reader,
        ):
            facts = json.loads(reader.json())
    except C2paError.ManifestNotFound:
        return None
    except C2paError as error:
        # There is one, and it cannot even be read.
        return (
            Signature(False, None, "", "", "", "", "", (_plain(_reason(error)),))
            if is_signed(picture)
            else None
        )
    manifest = facts["manifests"].get(facts.get("active_manifest"), {})
    signed = manifest.get("signature_info") or {}
    programs = manifest.get("claim_generator_info") or [{}]
    failures = facts.get("validation_results", {}).get("activeManifest", {}).get("failure", [])
    faults = tuple(dict.fromkeys(each["code"] for each in failures if each["code"] != _UNTRUSTED))
    return Signature(
        valid=facts.get("validation_state") in ("Valid", "Trusted"),
        trusted=None if authorities is None else facts.get("validation_state") == "Trusted",
        signer=_plain(signed.get("common_name")),
        organisation=_plain(signed.get("issuer")),
        algorithm=_plain(signed.get("alg")).lower(),
        program=" ".join(_plain(programs[0].get(part)) for part in ("name", "version")).strip(),
        signed_at=_plain(signed.get("time")),
        faults=faults,
    )


def _manifest(receipt: Mapping[str, Any] | None) -> dict[str, Any]:
    program = {"name": _PROGRAM, "version": version("zimage-turbo")}
    is_edit = receipt is not None and receipt.get("edit") is not None
    actions: list[dict[str, Any]] = [
        {
            "action": "c2pa.edited" if is_edit else "c2pa.created",
            "softwareAgent": program,
            "digitalSourceType": _SOURCE_TYPES + (_DRAWN_INTO_A_PICTURE if is_edit else _DRAWN),
        }
    ]
    source = "source"
    if is_edit:
        actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": [source]}})
    if receipt is not None and receipt.get("watermark"):
        actions.append({"action": "c2pa.watermarked.unbound", "softwareAgent": program})
    return {
        "claim_generator_info": [program],
        # Nothing of the source's own manifest is known here: it came as pixels.
        "ingredients": [{"title": source, "label": source, "relationship": "parentOf"}] if is_edit else [],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            *([{"label": RECEIPT_LABEL, "data": dict(receipt)}] if receipt is not None else []),
        ],
    }


def _plain(told: object, limit: int = 200) -> str:
    """What a stranger's file tells, so that no terminal takes it for a command."""
    text = "" if told is None else str(told)
    return "".join(each if each.isprintable() else "?" for each in text[:limit])


def _media_type(picture: bytes) -> str:
    for beginning, media_type in _MEDIA_TYPES.items():
        if picture.startswith(beginning):
            return media_type
    raise InvalidRequest("this is no picture; give a PNG, JPEG or WebP file", "image")


def _reason(error: BaseException | None) -> str:
    """What the library complains of, without the name of its class in front."""
    return str(error).partition(": ")[2].rstrip(".") or str(error)


def _read(file: Path, setting: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequest(
            f"setting {setting} names {file}, which cannot be read: {error.strerror}; correct the path, or "
            "leave both c2pa_certificate and c2pa_key out",
            setting,
        ) from error


def _signers_certificate(chain: bytes, file: Path) -> Certificate:
    from cryptography import x509

    try:
        signer = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise InvalidRequest(
            f"setting c2pa_certificate must be a file with a chain of certificates in PEM, the signer's own "
            f"first, and {file} has none that can be read",
            "c2pa_certificate",
        ) from error
    now = datetime.now(UTC)
    if not signer.not_valid_before_utc <= now <= signer.not_valid_after_utc:
        raise InvalidRequest(
            f"setting c2pa_certificate: {file} holds from {signer.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{signer.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and now it is {now:%Y-%m-%d %H:%M}; renew it",
            "c2pa_certificate",
        )
    return signer


def _private_key(pem: bytes, file: Path) -> PrivateKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(pem, password=None)
    except TypeError as error:  # it has a password
        raise InvalidRequest(
            f"setting c2pa_key: {file} has a password, and nobody is there to type it; write it without one: "
            "openssl pkey -in FILE -out NEW",
            "c2pa_key",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidRequest(
            f"setting c2pa_key must be a file with a private key in PEM, and {file} has none that can be "
            "read; name the key that belongs to the certificate",
            "c2pa_key",
        ) from error


def _check_pair(signer: Certificate, private: PrivateKeyTypes, certificate: Path, key: Path) -> None:
    if signer.public_key() != private.public_key():
        raise InvalidRequest(
            f"setting c2pa_certificate: the first certificate of {certificate} is not that of the key in "
            f"{key}; the signer's own comes first, then those that vouch for it",
            "c2pa_certificate",
        )


def _algorithm(private: PrivateKeyTypes, wanted: str | None, file: Path) -> str:
    """The name that C2PA gives to signing with the key. Raises InvalidRequest for one that it does not."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    fits: tuple[str, ...] = ()
    if isinstance(private, ec.EllipticCurvePrivateKey):
        curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
        fits = (curves[private.curve.name],) if private.curve.name in curves else ()
    elif isinstance(private, rsa.RSAPrivateKey) and private.key_size >= 2048:
        fits = ("ps256", "ps384", "ps512")
    elif isinstance(private, ed25519.Ed25519PrivateKey):
        fits = ("ed25519",)
    if not fits:
        raise InvalidRequest(
            f"setting c2pa_key: the key in {file} is of a kind that C2PA does not sign with; it must be one "
            "of P-256, P-384, P-521, RSA with 2048 bits or more, or Ed25519",
            "c2pa_key",
        )
    if wanted is not None and wanted not in fits:
        raise InvalidRequest(
            f"setting c2pa_algorithm must be {' or '.join(fits)} for the key in {file}, got {wanted}; leave "
            "it out, and it goes with the key",
            "c2pa_algorithm",
        )
    return wanted or fits[0]


def _context(chain: bytes, private: PrivateKeyTypes, algorithm: str, timestamp_url: str | None) -> Context:
    from c2pa import C2paError, C2paSignerInfo, Context, Signer
    from cryptography.hazmat.primitives import serialization

    # The one form of a key that the library takes.
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        signer = Signer.from_info(C2paSignerInfo(algorithm, chain, pem, timestamp_url))
        return Context.from_dict(dict(_OFFLINE), signer=signer)
    except C2paError as error:
        raise InvalidRequest(
            f"settings c2pa_certificate and c2pa_key cannot be used: {_reason(error)}; {_WANTED}",
            "c2pa_certificate",
        ) from error

"""Certificates of those who sign pictures: an authority's own, and that of a signer whom it vouches for."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes as Key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
DAY = timedelta(days=1)


@dataclass(frozen=True)
class Credentials:
    """The files of a signer, and the authority's certificate in PEM."""

    certificate: Path
    key: Path
    authority: str

    def as_settings(self) -> dict[str, str]:
        return {"c2pa_certificate": str(self.certificate), "c2pa_key": str(self.key)}


def p256() -> Key:
    return ec.generate_private_key(ec.SECP256R1())


def p384() -> Key:
    return ec.generate_private_key(ec.SECP384R1())


def rsa2048() -> Key:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def edwards() -> Key:
    return ed25519.Ed25519PrivateKey.generate()


def write_credentials(
    folder: Path,
    key: Key | None = None,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    ended: bool = False,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    password: bytes | None = None,
    name: str = "Example Painter",
) -> Credentials:
    """A signer's certificate and key, and the authority's certificate behind it in the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    authoritys, signers = p256(), key or p256()
    authority = _certificate("Example Root", "Example Root", authoritys, authoritys, None)
    until = datetime.now(UTC) - DAY if ended else datetime.now(UTC) + 30 * DAY
    signer = _certificate(name, "Example Root", signers, authoritys, usage, until)
    chain, file = folder / "certificate.pem", folder / "key.pem"
    chain.write_bytes(signer.public_bytes(PEM) + authority.public_bytes(PEM))
    hidden = (
        serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    )
    file.write_bytes(signers.private_bytes(PEM, form, hidden))
    file.chmod(0o600)
    return Credentials(chain, file, authority.public_bytes(PEM).decode())


def _certificate(
    subject: str,
    issuer: str,
    key: Key,
    issuers: Key,
    usage: x509.ObjectIdentifier | None,
    until: datetime | None = None,
) -> x509.Certificate:
    is_authority = usage is None
    until = until or datetime.now(UTC) + 30 * DAY
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(until - 40 * DAY)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(_key_usage(is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers.public_key()), critical=False
        )
    )
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return builder.sign(issuers, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Studio"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )

"""Certificates for endpoints: good ones, and those that a client must refuse."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate authority of a test. Files go to ``folder``; each has the certificate and its key."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def path(self) -> Path:
        """Return the authority's certificate."""
        return self.folder / "authority.pem"

    def issue(self, name: str, *, days: int = 1, client: bool = False) -> Path:
        """Issue a certificate for a host or an account; a negative number of days: expired so long ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(
            name, key=key, issuer=self.certificate.subject, signer=self.key, days=days, names=() if client else (name,)
        )
        return _write(self.folder / f"{name}{'-client' if client else ''}{days}.pem", certificate, key)


def authority(folder: Path) -> Authority:
    """Make an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject("vmsnap test authority")
    certificate = _certificate("vmsnap test authority", key=key, issuer=subject, signer=key, days=2, names=None)
    (folder / "authority.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return Authority(folder=folder, certificate=certificate, key=key)


def self_signed(folder: Path, *, name: str) -> Path:
    """Make a certificate that nobody vouches for."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _certificate(name, key=key, issuer=_subject(name), signer=key, days=1, names=(name,))
    return _write(folder / "self-signed.pem", certificate, key)


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    name: str,
    *,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    names: tuple[str, ...] | None,
) -> x509.Certificate:
    """Return a certificate; ``names`` None: an authority's."""
    end = datetime.now(UTC) + days * _DAY
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(end - abs(days) * _DAY - _DAY)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(item) for item in names]), critical=False)
    return builder.sign(signer, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Path:
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path.chmod(0o600)
    return path

"""The federation's own certificate authority, and the certificates it gives: only invited clients know and trust it."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flocktune.enrolment import write_private
from flocktune.errors import Problem, UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder, ExtensionType, GeneralName

AUTHORITY_DAYS = 3650
SERVER_DAYS = 730


def create_authority(folder: Path, federation: str) -> None:
    """Write ca.pem and ca.key (EC P-384, ten years, may sign certificates of servers only). Raises OSError."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP384R1())
    # Two federations of the same name have different authorities; so must be their names, or chains are mixed up.
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, f"flocktune {federation}"[:64]),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{x509.random_serial_number():x}"[:16]),
        ]
    )
    extensions: list[tuple[ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_usage(signs_certificates=True), True),
    ]
    certificate = _certificate(name, name, key, key, AUTHORITY_DAYS, extensions)
    _write(folder / "ca.pem", folder / "ca.key", certificate, key)


def issue(authority: Path, certificate_path: Path, key_path: Path, names: Sequence[str], days: int) -> None:
    """Write a server's certificate for ``names`` (DNS names or IP addresses), signed by the authority, with a new key.

    Raises UserError when the authority's files can not be read, and OSError.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    try:
        signer = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
        signing_key = load_pem_private_key((authority / "ca.key").read_bytes(), None)
    except (ValueError, TypeError, OSError) as error:
        fix = "Restore ca.pem and ca.key from a backup; without them clients must be enrolled anew."
        raise UserError(Problem(str(authority), "a certificate authority", str(error), fix)) from None
    assert isinstance(signing_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    extensions: list[tuple[ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([_general_name(name) for name in names]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), False),
    ]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    _write(certificate_path, key_path, _certificate(subject, signer.subject, key, signing_key, days, extensions), key)


def days_left(certificate_path: Path) -> int:
    """Whole days until a certificate ends; negative when it has. Raises UserError when it can not be read."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
    except (ValueError, OSError) as error:
        fix = "Write a new one by: flocktune federation init DIR --renew"
        raise UserError(Problem(str(certificate_path), "a certificate", str(error), fix)) from None
    return (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days


def _certificate(
    subject: object,
    issuer: object,
    key: EllipticCurvePrivateKey,
    signing_key: EllipticCurvePrivateKey,
    days: int,
    extensions: Sequence[tuple[ExtensionType, bool]],
) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    builder: CertificateBuilder = (
        x509.CertificateBuilder()
        .subject_name(subject)  # type: ignore[arg-type]
        .issuer_name(issuer)  # type: ignore[arg-type]
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # An owner's clock may be late by a day.
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signing_key, hashes.SHA384())


def _usage(*, signs_certificates: bool) -> ExtensionType:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(certificate_path: Path, key_path: Path, certificate: Certificate, key: EllipticCurvePrivateKey) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    write_private(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_private(certificate_path, certificate.public_bytes(Encoding.PEM))

"""A video is marked as AI-generated: in its metadata always, and in Content Credentials with a certificate."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from handler.encode import Target, encode
from handler.provenance import AI_GENERATED, ProvenanceError, Signer


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, authority: bool
) -> x509.Certificate:
    def named(text: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests")
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = (
        x509.CertificateBuilder(named(issuer), named(name), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_id, critical=False)
    )
    if not authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


@pytest.fixture
def identity(tmp_path: Path) -> tuple[Path, Path]:
    """The files of a certificate, with the one of its authority behind it, and of its key."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    chain = (
        certificate("signer", key, "root", root_key, authority=False),
        certificate("root", root_key, "root", root_key, authority=True),
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "chain.pem").write_bytes(b"".join(each.public_bytes(pem) for each in chain))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    return tmp_path / "chain.pem", tmp_path / "key.pem"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    target = Target(tmp_path / "video.mp4", tmp_path / "poster.jpg", tmp_path / "sheet.jpg", 64, 64, 8)
    encode([np.zeros((8, 64, 64, 3), np.uint8)], target, lambda _: None)
    return target.video


def printed(video: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(video), "-f", "null", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_the_metadata_of_every_video_says_that_it_is_generated(video: Path) -> None:
    assert f"comment         : AI-generated video ({AI_GENERATED})" in printed(video)


def test_a_signed_video_says_who_made_it_with_what(video: Path, identity: tuple[Path, Path]) -> None:
    c2pa: Any = pytest.importorskip("c2pa")
    Signer.load(*identity, "1.5.0").sign(video)
    with c2pa.Reader(video) as reader:
        content = json.loads(reader.json())
    manifest = content["manifests"][content["active_manifest"]]
    assert manifest["signature_info"]["issuer"] == "Tests"
    assert AI_GENERATED in json.dumps(manifest["assertions"])
    failures = {failure["code"] for failure in content["validation_results"]["activeManifest"]["failure"]}
    assert failures <= {"signingCredential.untrusted"}, "nobody trusts the authority of the tests"
    assert "Video: h264" in printed(video)
    assert [path.name for path in video.parent.glob("*.mp4")] == ["video.mp4"]


def test_a_key_of_another_certificate_is_named_at_the_start(identity: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("c2pa")
    other = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "other.pem").write_bytes(other.private_bytes(serialization.Encoding.PEM, *plain))
    for key in (tmp_path / "other.pem", tmp_path / "missing.pem"):
        with pytest.raises(ProvenanceError, match="HUNYUAN_C2PA_KEY"):
            Signer.load(identity[0], key, "1.5.0")

"""Content Credentials (C2PA): signs a video as AI-generated, with the operator's certificate.

Needs the extra `c2pa`. Source: https://spec.c2pa.org/specifications/specifications/2.1/specs/C2PA_Specification.html,
and the IPTC's digital source types for AI-generated media.
"""

import importlib
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

#: The IPTC's name for media that a trained model made.
AI_GENERATED: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_MEDIA_TYPE: Final = "video/mp4"


class ProvenanceError(Exception):
    """The certificate or its key does not sign; the text names the setting."""


@dataclass(frozen=True)
class Signer:
    """Signs with a private key (PKCS#8, for ES256) and its chain of certificates (PEM, the signer's own one first)."""

    certificate: bytes
    key: bytes
    version: str

    @classmethod
    def load(cls, certificate: Path, key: Path, version: str) -> "Signer":
        """Reads both files and checks that they belong together.

        Raises:
            ProvenanceError: the extra is not installed, or a file is missing, wrong or belongs to another one.
        """
        _library()
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
            return cls(certificate.read_bytes(), key.read_bytes(), version)
        except (OSError, ssl.SSLError) as exc:
            text = f"HUNYUAN_C2PA_CERTIFICATE {certificate} and HUNYUAN_C2PA_KEY {key} do not sign: {exc}"
            raise ProvenanceError(text) from exc

    def sign(self, video: Path) -> None:
        """Adds a signed manifest to the MP4: a trained model made it.

        Raises:
            ProvenanceError: the library refuses the certificate, for example one that signs itself.
        """
        c2pa = _library()
        action = {"action": "c2pa.created", "digitalSourceType": AI_GENERATED}
        manifest = {
            "claim_generator_info": [{"name": "hunyuan-video-service", "version": self.version}],
            "format": _MEDIA_TYPE,
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = video.with_suffix(".signed.mp4")
        info = c2pa.C2paSignerInfo(alg=b"es256", sign_cert=self.certificate, private_key=self.key, ta_url=None)
        try:
            with (
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(json.dumps(manifest)) as builder,
                video.open("rb") as source,
                signed.open("w+b") as target,
            ):
                builder.sign(signer, _MEDIA_TYPE, source, target)
        except c2pa.C2paError as exc:
            raise ProvenanceError(f"HUNYUAN_C2PA_CERTIFICATE does not sign: {exc}") from exc
        signed.replace(video)


def _library() -> Any:
    try:
        return importlib.import_module("c2pa")
    except ImportError as exc:
        text = "HUNYUAN_C2PA_CERTIFICATE needs the extra c2pa: pip install 'hunyuan-video-service[c2pa]'"
        raise ProvenanceError(text) from exc

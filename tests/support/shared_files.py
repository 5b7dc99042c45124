"""What libraries read again for each client, and what the tests' process reads once.

A test makes a dozen clients. Each `boto3` client parses botocore's description of S3, which takes ten times as long as
the rest of it, and each `httpx` client the certificates of all authorities, which no test needs.
"""

from __future__ import annotations

import functools
import ssl

import botocore.session
import pytest


def read_once() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
    patch.setattr(ssl, "create_default_context", functools.cache(ssl.create_default_context))

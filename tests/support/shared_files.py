"""What libraries read again for each client, and what the tests' process reads once.

A test makes a dozen clients. Each `boto3` client parses botocore's description of S3, which takes ten times as long as
the rest of it, and each `httpx` client the certificates of all authorities, which no test needs.
"""

from __future__ import annotations

import functools
import ssl
from typing import Any

import botocore.session
import pytest


def read_once() -> None:
    create_context = ssl.create_default_context
    trusting = functools.cache(lambda cafile: create_context(cafile=cafile))

    def create(*purpose: Any, **options: Any) -> ssl.SSLContext:
        """A shared context for clients that trust a file of authorities. Others may change theirs."""
        if not purpose and options.keys() == {"cafile"}:
            context: ssl.SSLContext = trusting(options["cafile"])
            return context
        return create_context(*purpose, **options)

    patch = pytest.MonkeyPatch()
    patch.setattr(ssl, "create_default_context", create)
    patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))

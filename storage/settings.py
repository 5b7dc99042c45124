"""Bucket settings, with the names that RunPod's workers use."""

import os
from pathlib import Path

from pydantic import Field, HttpUrl, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from contract.settings import Settings


class BucketSettings(Settings):
    """The bucket's address and credentials.

    Raises:
        pydantic.ValidationError: naming each environment variable that is missing or wrong.
    """

    endpoint_url: HttpUrl = Field(
        validation_alias="BUCKET_ENDPOINT_URL", description="Address of the S3 server, without the bucket."
    )
    access_key_id: str = Field(validation_alias="BUCKET_ACCESS_KEY_ID", description="Access key.")
    secret_access_key: SecretStr = Field(
        validation_alias="BUCKET_SECRET_ACCESS_KEY", description="Secret key. Never logged."
    )
    name: str = Field(
        default="hunyuan-videos", min_length=3, validation_alias="BUCKET_NAME", description="Name of the bucket."
    )
    region: str = Field(default="us-east-1", validation_alias="BUCKET_REGION", description="Region in signatures.")
    public_endpoint_url: HttpUrl | None = Field(
        default=None,
        validation_alias="BUCKET_PUBLIC_ENDPOINT_URL",
        description="Address of the same S3 server for clients, if they can't reach BUCKET_ENDPOINT_URL. "
        "Presigned URLs in job results use it.",
    )
    url_expires_in: int = Field(
        default=86_400,
        ge=1,
        le=604_800,
        validation_alias="BUCKET_URL_EXPIRES_IN",
        description="Seconds until presigned URLs in job results expire; S3 allows up to 7 days.",
    )
    sync_directory: Path | None = Field(
        default=None,
        validation_alias="BUCKET_SYNC_DIRECTORY",
        description="Directory of this machine that holds the bucket's data. A worker syncs its file system to disk "
        "before and after it stores a manifest. Set by `hunyuan serve` for its embedded bucket.",
    )


class JobBucketSettings(BucketSettings):
    """The bucket that a job brings in RunPod's `s3Config`.

    Never read from the environment, because our credentials must not be sent to a client's endpoint.

    Source: RunPod's documentation of job requests, "S3-compatible storage".

    Raises:
        pydantic.ValidationError: naming each field that is missing or malformed.
    """

    endpoint_url: HttpUrl = Field(validation_alias="endpointUrl")
    access_key_id: str = Field(validation_alias="accessId")
    secret_access_key: SecretStr = Field(validation_alias="accessSecret")
    name: str = Field(default="hunyuan-videos", min_length=3, validation_alias="bucketName")
    #: A client must not choose a directory of this machine.
    sync_directory: None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic-settings fixes the signature
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read the job's s3Config only."""
        return (init_settings,)


def bucket_settings() -> BucketSettings | None:
    """The settings of the bucket in the environment; None if it has none.

    Raises:
        pydantic.ValidationError: a variable is missing or wrong.
    """
    names = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
    return BucketSettings() if any(os.environ.get(name) for name in names) else None

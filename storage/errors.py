"""Errors of the bucket. `storage.bucket` translates boto3's errors into these."""


class StorageError(Exception):
    """A request to the bucket failed."""


class ObjectNotFoundError(StorageError):
    """The bucket has no object with this key."""


class ObjectExistsError(StorageError):
    """The object was to be written only if its key was free, and it is not."""


class StorageUnavailableError(StorageError):
    """The S3 server did not answer, or answered that it is busy or broken. A retry may succeed."""


class StorageFullError(StorageUnavailableError):
    """The S3 server's disk is full. A retry succeeds once somebody has freed space."""


class StorageDeniedError(StorageError):
    """The S3 server refuses the request until a setting or a clock is corrected."""

"""What can go wrong between us and an S3 server, in our own words."""


class StorageError(Exception):
    """The bucket could not do what was asked."""


class ObjectNotFoundError(StorageError):
    """There is no object under that key."""


class StorageUnavailableError(StorageError):
    """The S3 server did not answer, or answered that it can't just now."""


class StorageDeniedError(StorageError):
    """The S3 server refuses us until something is mended: keys, the bucket's name, its region, a clock."""

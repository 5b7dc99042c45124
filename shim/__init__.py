"""The REST server: the documented API over a job queue and a bucket."""

__version__ = "1.5.0"

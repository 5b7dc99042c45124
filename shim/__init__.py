"""The REST server: the documented API over a job queue and a bucket."""

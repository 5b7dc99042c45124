"""`hunyuan serve`: the server with its bucket, queue and workers on one machine."""

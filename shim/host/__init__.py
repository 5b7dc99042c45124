"""`hunyuan serve` and `hunyuan worker`: the server with its bucket, queue and workers on one machine."""

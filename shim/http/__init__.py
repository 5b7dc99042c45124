"""What surrounds every route: the HTTP server, its limits, the access log and the API key."""

"""The faces of the REST server, one module each."""

"""The bucket: where videos, posters and manifests live."""

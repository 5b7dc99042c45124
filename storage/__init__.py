"""The bucket that holds videos, posters and manifests."""

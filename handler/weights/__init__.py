"""Offline: get and convert checkpoints."""

"""Offline: download and convert checkpoints."""

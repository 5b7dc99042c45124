"""The model: torch, diffusers and transformers are imported here and in `handler.weights` only."""

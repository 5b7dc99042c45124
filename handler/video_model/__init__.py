"""The model: torch, diffusers and transformers live here and nowhere else."""

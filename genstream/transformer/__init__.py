"""The causal diffusion transformer."""

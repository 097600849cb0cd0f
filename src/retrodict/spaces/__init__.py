"""Spaces: the generative processes of latents."""

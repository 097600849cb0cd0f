"""Tools that write into the latent; ``spaces.tools`` says how."""

from retrodict.tools.calculator import calculator

__all__ = ["calculator"]

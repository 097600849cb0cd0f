"""Samplers: (target, policy) to Particles."""

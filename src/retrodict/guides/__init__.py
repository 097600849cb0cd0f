"""Guides: log psi on partial objects."""

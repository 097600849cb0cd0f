"""Targets: what the answer means."""

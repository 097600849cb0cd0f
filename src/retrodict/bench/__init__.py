"""Benchmarks: commands that measure what the docs claim."""

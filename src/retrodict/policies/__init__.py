"""Policies: where a model meets a space."""

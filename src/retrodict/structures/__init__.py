"""Structures: posteriors over graphs and consistent worlds, with data, a language model, or both as the evidence."""

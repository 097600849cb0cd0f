"""Tasks: small open data made here, larger data by path, prompts, problems and their evaluation."""

"""Language models: token ids to logits with a cache."""

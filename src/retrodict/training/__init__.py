"""Fine-tuning a policy to sample the posterior: collect, score, step; replay, schedules, checkpoints."""

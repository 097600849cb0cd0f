"""Hugging Face models: the only room that knows transformers and peft."""

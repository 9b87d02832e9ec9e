"""Trains adapters on the NF4 base model that serves them (QLoRA), several in one pass."""

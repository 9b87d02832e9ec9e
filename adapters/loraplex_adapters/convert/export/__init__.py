"""Adapters as files for other programs: merged checkpoints, GGUF adapters, blends of LoRA."""

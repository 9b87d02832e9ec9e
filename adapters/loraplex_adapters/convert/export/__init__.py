"""Exports for other programs: merged checkpoints, GGUF adapters, blends of LoRA adapters."""

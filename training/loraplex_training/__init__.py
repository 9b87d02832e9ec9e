"""How adapters are made: QLoRA on the base that serves them, several in one pass."""

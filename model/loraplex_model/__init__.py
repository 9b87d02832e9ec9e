"""The adapted model: an NF4-quantised decoder that applies a different LoRA mix to every row."""

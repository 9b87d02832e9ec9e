"""Texts and tokens: `/tokenize`, `/detokenize`, `/tokenizer_info`."""

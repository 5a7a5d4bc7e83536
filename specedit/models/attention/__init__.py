"""Attention over mixed sequences: contexts, processors, and the last block."""

"""Section 3 of the paper (arXiv 2605.02152). Knows no model and no cost."""

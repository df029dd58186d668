"""Zeroth-order fine-tuning inside a serving engine: the server's side of ZO-Act (arXiv 2607.01125)."""

"""Data files -> checked rows of token ids, with every problem named before a model loads."""

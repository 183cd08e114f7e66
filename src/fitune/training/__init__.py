"""The training loop, what it stores and what it shows."""

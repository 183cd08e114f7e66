"""Fine-tune language models in the memory you have."""

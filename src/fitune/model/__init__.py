"""A model folder or hub id -> a frozen transformers model."""

"""The fast path: one decoder block with an explicit backward pass (docs/engine.md)."""

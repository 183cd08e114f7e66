"""Load a run or a model, generate, chat, export."""

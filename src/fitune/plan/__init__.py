"""What a run needs, said before it starts, from config.json alone: parameters and bytes. No torch in this room."""

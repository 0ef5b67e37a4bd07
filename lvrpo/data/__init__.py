"""Data sets: the embedded digit scenes and a user's own JSONL."""

"""The LVRPO training loop and what it needs."""

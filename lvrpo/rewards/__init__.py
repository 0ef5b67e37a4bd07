"""Rewards of the LVRPO method: semantic grounding, rule checks, knowledge consistency."""

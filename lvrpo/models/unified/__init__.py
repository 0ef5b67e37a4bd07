"""A small unified model that reads and draws: a mixture of transformers."""

"""lvrpo inside the models of transformers: what its linear ops take, from a model's own forward.

Five lines to start with, and what is refused: docs/integrations.md.
"""

from lvrpo.integrations.transformers.completions import CompletionStates, completion_states

__all__ = ["CompletionStates", "completion_states"]

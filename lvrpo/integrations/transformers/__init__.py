"""lvrpo inside the models of transformers: their attention, and their head for the linear ops.

Five lines to start with, and what is refused: docs/integrations.md.
"""

from lvrpo.integrations.transformers.attention import register, set_attention
from lvrpo.integrations.transformers.completions import CompletionStates, completion_states

__all__ = ["CompletionStates", "completion_states", "register", "set_attention"]

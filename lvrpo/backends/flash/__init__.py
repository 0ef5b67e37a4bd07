"""`packed_attention` over calls of flash-attn."""

"""Shared by several tools: ViT sizes, token counts, photographs, pictures with captions."""

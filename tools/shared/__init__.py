"""What several tools need: ViT sizes, token counts, photographs, pictures with captions."""

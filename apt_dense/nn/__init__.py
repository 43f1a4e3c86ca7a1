"""Modules on packed tokens: embedding, positions, blocks, feature pyramid."""

"""State dicts: reading, converting and loading those of all supported ViTs."""

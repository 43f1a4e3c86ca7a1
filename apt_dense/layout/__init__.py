"""From a scale map to the packed order of all tokens of a batch, and back to feature maps."""

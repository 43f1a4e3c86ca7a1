"""From an image to its scale map: which patches it is cut into."""

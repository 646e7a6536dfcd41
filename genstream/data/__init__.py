"""Training data: the procedural toy world."""

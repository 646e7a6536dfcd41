"""Video VAEs that stream."""

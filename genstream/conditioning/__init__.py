"""What a stream is conditioned on: text, images."""

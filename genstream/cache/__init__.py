"""The key-value cache of a stream: where frames stand, and the tensors that hold them."""

"""The `genstream` command."""

"""Scores that read videos, not models."""

"""Tests mirror headwater/ path by path."""

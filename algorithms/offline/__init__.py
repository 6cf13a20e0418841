"""Algorithms that learn from logged data alone."""

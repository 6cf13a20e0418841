"""Mathematics of return distributions: pure functions on arrays, no networks, no state."""

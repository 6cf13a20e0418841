"""Papers that live where whole return distributions can be computed: finite problems and small offline data."""

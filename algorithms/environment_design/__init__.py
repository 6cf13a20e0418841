"""Algorithms that choose the environments in which their agent learns."""

"""Agents that follow the gradient of the return through the policy's own actions."""

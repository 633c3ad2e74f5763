"""Experiments: settings and their files, the two tasks, and running them."""

"""Graphcore IPUs, through PopART in a Python of its own."""

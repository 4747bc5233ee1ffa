"""Weights: fetched, and read without running code."""

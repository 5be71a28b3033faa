"""Tiny models and contracts, shipped so that others can test their own techniques."""

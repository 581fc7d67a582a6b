"""Losses whose vocabulary is spread over ranks: each owns the rows of some classes, and scores the examples of all."""

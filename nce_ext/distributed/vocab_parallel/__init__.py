"""A vocabulary spread over processes: each keeps the rows of some classes, and scores the examples of all."""

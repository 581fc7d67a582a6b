"""One call of a sampled loss: its arguments checked and grouped, its path chosen, its losses reduced."""

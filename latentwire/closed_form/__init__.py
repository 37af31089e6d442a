"""A start of a wire in closed form: moments of one pass over texts, and a regression on them."""

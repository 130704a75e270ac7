"""The normal form: one dialect for patterns to be written against, and what can be asked of a graph in it."""

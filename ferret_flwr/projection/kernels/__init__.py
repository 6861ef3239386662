"""Answers to the same two questions: a reference in NumPy, and faster ones."""

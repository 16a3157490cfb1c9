"""Choices among options that come with the input: one of them, or an ordered few."""

"""Answers that a student and a teacher write together, to be learned by SFT."""

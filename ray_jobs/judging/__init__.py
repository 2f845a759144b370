"""Pairs, rubric, parsing, similarity, coverage, statistics. Free of Ray."""

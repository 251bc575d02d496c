"""Runs that are over, compared user by user: differences, intervals, tests, power."""

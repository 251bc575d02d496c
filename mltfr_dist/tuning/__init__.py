"""Sweeps: search spaces, and their trials on Ray. A trial is the same run that train.py makes."""

"""Statistics of paired differences: resampling, power, equivalence. Arrays in, numbers out."""

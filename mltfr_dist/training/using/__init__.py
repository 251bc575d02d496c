"""A finished run at work: its numbers again, recommendations, explanations, exports."""

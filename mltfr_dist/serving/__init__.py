"""A trained model in use: histories in any form, recommendations, and what they come from."""

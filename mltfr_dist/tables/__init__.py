"""Token tables: the input-embedding matrices of language models, extracted once and stored
clean.
"""

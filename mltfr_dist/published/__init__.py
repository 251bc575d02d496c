"""The published form of the method, defects included (docs/method.md lists them); nothing else
needs this room.
"""

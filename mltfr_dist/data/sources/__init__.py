"""Raw interactions as users have them: found, unpacked, understood and read."""

"""What a prepared folder holds, for people to look at."""

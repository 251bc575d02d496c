"""In place of an agent of the raylet (own_ray.py): does nothing, and ends with its parent."""

import os
import time

SECONDS = 1.0
"""Between two looks at the parent."""


def main() -> None:
    """Wait for the parent's end."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(SECONDS)


if __name__ == "__main__":
    main()

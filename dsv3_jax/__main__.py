"""`python -m dsv3_jax`: the same as the command `dsv3`."""

import sys

from dsv3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

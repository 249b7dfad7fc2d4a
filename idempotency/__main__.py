"""``python -m idempotency``: see :mod:`idempotency.cli`."""

import sys

from idempotency.cli import main

if __name__ == "__main__":
    sys.exit(main())

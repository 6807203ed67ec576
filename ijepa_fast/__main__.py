"""``python -m ijepa_fast`` is the command ``ijepa-fast``."""

import sys

from ijepa_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())

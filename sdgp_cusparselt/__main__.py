"""``python -m sdgp_cusparselt``."""

import sys

from sdgp_cusparselt.commands.parser import main

if __name__ == "__main__":
    sys.exit(main())

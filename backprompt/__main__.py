"""`python -m backprompt`: the command line."""

import sys

from backprompt.cli import main

if __name__ == "__main__":
    sys.exit(main())

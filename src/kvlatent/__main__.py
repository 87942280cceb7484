"""`python -m kvlatent`, and with it `accelerate launch -m kvlatent`."""

import sys

from kvlatent.cli import main

sys.exit(main())

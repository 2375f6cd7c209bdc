"""`python -m worldmodel` is `wm`."""

import sys

from worldmodel.tools.cli import main

sys.exit(main())

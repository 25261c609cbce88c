"""`python -m mmlg_scale` is the `mmlg` command."""

import sys

from mmlg_scale.cli import main

sys.exit(main())

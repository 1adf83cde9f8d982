"""``python -m timm_csg``."""

import sys

from timm_csg.cli import main

sys.exit(main())

"""Imported first by the server that forks jobs, and by nothing else: the server ends with the launcher.

By itself it would see the launcher's end only once its imports are done, which takes seconds.
"""

import os

from mmlg_launchers.supervise import PARENT_VARIABLE, ends_with

ends_with(int(os.environ[PARENT_VARIABLE]))()

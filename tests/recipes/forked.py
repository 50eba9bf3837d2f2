"""A script in a fork of a warm interpreter (hub/warm.py), with Python's own filters of warnings, which that one has none of:

... forked.py trl_recipes/grpo.py --config ...
"""

import os
import runpy
import sys
import warnings


warnings.resetwarnings()
for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
    warnings.simplefilter("ignore", category)
warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")

script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(script))
runpy.run_path(script, run_name="__main__")

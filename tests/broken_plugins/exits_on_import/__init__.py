"""It ends the interpreter when it is imported."""

import sys

sys.exit("this module is a script")

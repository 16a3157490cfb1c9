"""Runs programs one after the other in the processes of one launch: in_turn.py '[["-m", "module", ...], ["file.py"]]'.

Each runs as `python` would run it, with the arguments behind its name.
"""

import json
import runpy
import sys

for arguments in json.loads(sys.argv[1]):
    is_module = arguments[0] == "-m"
    sys.argv = arguments[is_module:]
    try:
        (runpy.run_module if is_module else runpy.run_path)(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise

"""Moved to tools/eval_seg.py, since pytest takes files named test_* for tests. Runs that."""

import shared.interrupts  # isort: skip (first, so that Ctrl-C ends the imports below in one line)

from eval_seg import main

if __name__ == "__main__":
    shared.interrupts.run(main)

"""Moved to tools/eval_seg.py, since pytest takes files named test_* for tests. Runs that."""

from eval_seg import main

if __name__ == "__main__":
    main()

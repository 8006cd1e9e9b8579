"""`minillm compare-runs`: draws the loss curves of two runs and their difference."""

from minillm_cli.compare_runs import main
from minillm_cli.console import run

if __name__ == "__main__":
    run(main, as_script=True)

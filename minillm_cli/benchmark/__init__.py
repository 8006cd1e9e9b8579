"""Speed of both frameworks and of their peers, as ratios to bounds that are measured in the same run.

To begin reading: `cases.py` (what is measured), `team.py` (the engines take turns) and `engines.py`.
"""


def main() -> None:
    """The command `minillm benchmark`."""
    from minillm_cli.benchmark.command import main  # not above: the processes of the engines do not need it

    main()

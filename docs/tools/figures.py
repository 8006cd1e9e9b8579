"""The figures of `docs/learn/`, computed by the code that they explain: `python docs/tools/figures.py` writes them all.

`test_learn.py` draws them again and compares them with the files.
"""

import figures_attention  # noqa: F401 (adds its figures to the list)
import figures_model  # noqa: F401
import figures_training  # noqa: F401
from drawing import FIGURES, FOLDER


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw() + "\n")
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()

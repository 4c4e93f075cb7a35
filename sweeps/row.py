"""One row, which --row names, with its settings after it: the program of the sweeps, so that a row can be a parameter.

python sweeps/row.py --row kd_cutmix --temperature 4
"""

import argparse
import sys

import common
from command_line import EXIT_CODES, orderly_end


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--row", default="given by --row")
    chosen, sys.argv[1:] = parser.parse_known_args()
    try:
        with orderly_end():
            recipe = common.load_recipe(chosen.row)
        common.cli(recipe)
    except SystemExit as stop:
        # A run that is ended early, as by Hyperband, has not failed; an agent that counts too many failures stops.
        sys.exit(0 if stop.code in EXIT_CODES.values() else stop.code)


if __name__ == "__main__":
    main()

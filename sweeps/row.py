"""One row, which --row names, with its settings after it: the program of the sweeps, so that a row can be a parameter.

python sweeps/row.py --row kd_cutmix --temperature 4
"""

import argparse
import sys

import common
from command_line import EXIT_CODES
from run_files import UserError


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--row", required=True)
    chosen, sys.argv[1:] = parser.parse_known_args()
    try:
        recipe = common.load_recipe(chosen.row)
    except UserError as error:
        sys.exit(f"error: {error} (--row)")
    try:
        common.cli(recipe)
    except SystemExit as stop:
        # A run that is ended early, as by Hyperband, has not failed; an agent that counts too many failures stops.
        sys.exit(0 if stop.code in EXIT_CODES.values() else stop.code)


if __name__ == "__main__":
    main()

"""``python -m agentropy.envs.serve``: the same as ``agentropy serve envs``."""

import argparse
import sys

from ...errors import AgentropyError
from .command import add_arguments, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m agentropy.envs.serve", description=main.__doc__)
    add_arguments(parser)
    try:
        sys.exit(main(parser.parse_args()))
    except AgentropyError as error:
        sys.exit(f"agentropy: {error}")

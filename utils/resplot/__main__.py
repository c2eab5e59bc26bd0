import sys

from utils.resplot.command import main
from utils.terminal import run_main

run_main(lambda: main(sys.argv[1:]))

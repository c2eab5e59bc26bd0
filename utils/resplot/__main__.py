import sys

from utils.resplot.command import main

sys.exit(main(sys.argv[1:]))

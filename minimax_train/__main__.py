import sys

from minimax_train.cli import main

sys.exit(main())

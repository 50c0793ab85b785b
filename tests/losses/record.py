"""Record the runs of ``support.losses`` with the code of this checkout, or compare two recordings bit for bit.

python tests/losses/record.py                          # all runs, into this folder
python tests/losses/record.py one tp --to FOLDER       # some, elsewhere
python tests/losses/record.py --compare FOLDER FOLDER  # exit status 1 where they differ
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from support import losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(losses.RUNS)}; all if none")
    parser.add_argument("--to", type=Path, default=losses.RECORDINGS, metavar="FOLDER")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FOLDER")
    options = parser.parse_args()
    if unknown := set(options.names) - set(losses.RUNS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(losses.RUNS)}")
    names, status = options.names or list(losses.RUNS), 0
    for name in names:
        if options.compare:
            actual, expected = (losses.read(folder / f"{name}.json") for folder in options.compare)
            found = losses.differences(actual, expected, tolerance=0.0)
            print(f"{name}: {len(found)} differences", *found[:5], sep="\n  ")
            status |= bool(found)
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            recording = losses.record(losses.RUNS[name], Path(folder))
        options.to.mkdir(parents=True, exist_ok=True)
        losses.write(options.to / f"{name}.json", recording)
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

from __future__ import annotations

import pytest

from support.distributed import run_ranks
from support.runs import tiny_run
from support.two_steps import SIZES, TwoSteps, two_steps_of_zero1


@pytest.fixture(scope="package")
def right(tmp_path_factory) -> dict[str, TwoSteps]:
    """Two steps of ``engine=zero1`` on one rank, by precision."""
    folder, found = tmp_path_factory.mktemp("right"), {}
    for precision in ("float32", "bfloat16"):
        config = tiny_run(folder / precision, *SIZES, "engine=zero1", f"engine.precision={precision}")
        (found[precision],) = run_ranks(two_steps_of_zero1, 1, config)
    return found

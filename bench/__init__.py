"""rnnkit's benchmarks: both sides in one process, alternately, and only where the numbers are right.

Commands, from a checkout::

    python -m bench.grid --quick            # the grid against torch.nn and ONNX Runtime
    python -m bench.growth                  # time against T, B, H
    python -m bench.startup                 # start to first prediction; memory of a training step
    python -m bench.gpu --dry-run           # on a GPU, beside torch.nn; see `bench.gpu`
    python -m bench.report FILE...          # tables and pictures of what these wrote with --json
    pytest bench --benchmark-only           # the same cases under pytest-benchmark

`cases` says what is measured, `ours` and `peers` how each side does it, `correct` whether its results
are right, `timing` how long it takes, `records` how that is written down; `goals`, `tables` and
`pictures` read records.

The wheel carries this package as ``rnnkit.bench``, without the suite and the results, so that ``rnnkit
bench`` works where rnnkit is only installed; in a checkout it is ``bench``. Hence all imports in here are
relative, and nothing outside pytest's files imports pytest. Whoever runs the grid from rnnkit tries the one
name, then the other, and calls ``grid.main(["--quick", ...])``, which returns the exit status.
"""

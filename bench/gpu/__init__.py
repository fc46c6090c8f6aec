"""The benchmark of a GPU: rnnkit on CuPy arrays beside torch.nn, eager and as a CUDA graph.

From a checkout::

    python -m bench.gpu --dry-run                     # the plan; needs no GPU
    python -m bench.gpu --minutes 8 --out results     # verify, then measure; the same command goes on
    python -m bench.report results/limits.json results/gpu.json

It verifies the kernels against NumPy, measures what the machine can do at best (`limits`), and then goes
through `plan`'s cells, the most important first, until the minutes are over. Each cell is checked against
the reference in float64 before it is timed, and written to disk as soon as it is done, so that a run that is
killed loses nothing but the cell it was at.

`rig` is the only file that knows the machine: `Gpu`, and `Host`, which puts NumPy and torch on the CPU in
its place, so that everything else here is tested without a GPU.
"""

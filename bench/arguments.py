"""The command-line arguments that the grid and the growth curves share."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import ours, peers
from .cases import CELLS
from .timing import QUICK, Effort, cores


class Setting(NamedTuple):
    """What to measure with, beside the cases themselves."""

    backend: str
    kernels: tuple[str, ...]
    peers: tuple[str, ...]
    threads: tuple[int, ...]
    effort: Effort


def parser(program: str, description: str, operations: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the common arguments."""
    result = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    add = result.add_argument
    add("--quick", action="store_true", help="few shapes and little time: whether it works, not how fast")
    add("--threads", type=_threads, default=None, metavar="N,...", help="default: 1, and 2 where they are")
    add("--backend", choices=ours.BACKENDS, default="numpy", help="rnnkit's backend (default: numpy)")
    add("--cells", type=some_of("cell", CELLS), default=CELLS, metavar=",".join(CELLS))
    add(
        "--operations", type=some_of("operation", operations), default=tuple(operations),
        metavar=",".join(operations),
    )  # fmt: skip
    add("--kernels", default=None, metavar="NAME,...", help="rnnkit's kernel modules (default: all)")
    add(
        "--peers", type=some_of("peer", peers.PEERS), default=None, metavar=",".join(peers.PEERS),
        help="default: those installed",
    )  # fmt: skip
    add("--json", type=result_file, default=None, metavar="FILE", help="write the records there")
    return result


def setting_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Setting:
    """Return the setting, or exit with status 2 and a message: something asked for is not to be had."""
    need_threadpoolctl(parser)
    modules = ours.kernel_modules(arguments.backend)
    kernels = modules
    if arguments.kernels is not None:
        try:
            kernels = some_of("kernel", modules)(arguments.kernels)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --kernels: {error}")
    lacking = {peer: peers.missing(peer) for peer in arguments.peers or peers.PEERS}
    for peer, names in lacking.items():
        if names:
            message = f"peer {peer}: {' and '.join(names)} not installed: pip install 'rnnkit[bench]'"
            if arguments.peers is not None:
                parser.error(message)
            print(f"without {message}", file=sys.stderr)
    threads = arguments.threads or ((1, 2) if cores() > 1 else (1,))
    effort = QUICK if arguments.quick else Effort()
    present = tuple(peer for peer, names in lacking.items() if not names)
    return Setting(arguments.backend, kernels, present, threads, effort)


def need_threadpoolctl(parser: argparse.ArgumentParser) -> None:
    """Exit with status 2 where the one package is missing that no benchmark can do without."""
    if importlib.util.find_spec("threadpoolctl") is None:
        parser.error("threadpoolctl is not installed: pip install 'rnnkit[bench]'")


def command_of(module: str, argv: Sequence[str]) -> str:
    """Return the command line that repeats a run, without the place on that machine it was written to."""
    kept: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in ("--json", "--out"):
            next(rest)
        elif not word.startswith(("--json=", "--out=")):
            kept.append(word)
    return shlex.join(["python", "-m", f"{__package__}.{module}", *kept])


def some_of(what: str, allowed: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Return a parser of comma-separated names out of `allowed`."""

    def parse(text: str) -> tuple[str, ...]:
        names = _split(text)
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            got = ", ".join(unknown) or "nothing"
            raise argparse.ArgumentTypeError(f"a {what} must be one of {', '.join(allowed)}, got {got}")
        return names

    return parse


def result_file(text: str) -> Path:
    """Return the path of a file that can be written: checked now, not after an hour."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory")
    return path


def _threads(text: str) -> tuple[int, ...]:
    most = cores()
    names = _split(text)
    if not names or not all(name.isdecimal() and 1 <= int(name) <= most for name in names):
        raise argparse.ArgumentTypeError(f"must be numbers from 1 to {most}, the cores, got {text!r}")
    return tuple(int(name) for name in names)


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def progress(items: Sequence[Any]) -> Any:
    """Return a progress bar over `items`; silent where nobody looks."""
    from tqdm import tqdm

    return tqdm(items, unit="case", disable=None, dynamic_ncols=True)

"""The command `rnnkit`: compare, train, generate, bench, warmup, info."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import kernels
from ._array import FLOAT_DTYPES, BackendUnavailableError, resolve_backend
from ._cuda import describe_cupy
from ._version import __version__
from .checkpoint import load
from .data import EOS, UNK, Vocabulary, counting_language, read_text, split
from .model import CELLS, LanguageModel
from .optim import Adam
from .recurrent import GRU, LSTM, RNN
from .training import cosine_schedule, device_data, evaluate, fit

# Seed 23 is the first whose training, validation and test sequences all have about the mean length of ten
# tokens, so that one entropy floor fits all curves of the picture.
_COMPARE_SEED = 23

# Adam divides by the root of the mean square gradient plus eps. With the usual 1e-8 the steps stay large
# where gradients are tiny, training jumps, and rounding errors grow until equal float32 models differ by
# 0.1 nats on the way. With 0.03 curves are smooth and can be compared; the final losses are the same.
_COMPARE_EPS = 0.03


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 1 for a failure, 2 for a wrong argument."""
    parser = _parser()
    args, args_of_grid = parser.parse_known_args(argv)
    if args_of_grid and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(args_of_grid)}")
    args.grid_arguments = args_of_grid
    try:
        status: int = args.run(args)
        return status
    except (
        ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError
    ) as error:  # fmt: skip
        return _fail(args, error, 2)
    except (BackendUnavailableError, FloatingPointError, ImportError, MemoryError) as error:
        return _fail(args, error, 1)
    except BrokenPipeError:  # `rnnkit generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(args, error, 1)
    except KeyboardInterrupt:
        print(f"\nrnnkit {args.command}: stopped; {args.resumes}", file=sys.stderr)
        return 130


def _fail(args: argparse.Namespace, error: BaseException, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"rnnkit {args.command}: error: {message}", file=sys.stderr)
    return status


# -------------------------------------------------------------------------------------------- commands


def _compare(args: argparse.Namespace) -> int:
    from .compare import compare, table

    metrics = compare(
        out=args.out, cells=args.cells, hidden_size=args.hidden_size, num_sequences=args.num_sequences,
        max_n=args.max_n, epochs=args.epochs, batch_size=args.batch_size, learning_rate=args.lr, eps=args.eps,
        clip_norm=args.clip_norm, forget_bias=args.forget_bias, seed=args.seed, backend=args.backend,
        dtype=args.dtype, torch_peer=args.torch, restart=args.restart, progress=args.progress,
    )  # fmt: skip
    print(f"\n{table(metrics)}\n")
    difference = metrics["largest_validation_difference_to_torch"]
    if difference is not None:
        print(f"largest difference between rnnkit's and torch's LSTM in validation loss: {difference:.1e}\n")
    example = metrics["example"]
    print(f"{example['model']} on a test sequence; ^ marks what the past decides")
    width = max(len(token) for token in example["target"])
    for row in ("input", "target", "prediction"):
        print(f"  {row:10s}  {' '.join(token.ljust(width) for token in example[row])}".rstrip())
    marks = ("^" if token == "b" else " " for token in example["input"])
    print(f"  {'':10s}  {' '.join(mark.ljust(width) for mark in marks)}".rstrip())
    print(f"\nwritten to {args.out}: loss.png, metrics.json, and the models")
    return 0


def _train(args: argparse.Namespace) -> int:
    if args.data == "counting":
        sequences = counting_language(args.num_sequences, args.max_n, args.seed)
        vocabulary = Vocabulary(sequences)
        parts: Any = split([vocabulary.encode(sequence) for sequence in sequences])
    else:
        tokens = read_text(args.data, args.level)
        vocabulary = Vocabulary([tokens], max_size=args.vocab_size)
        parts = split(vocabulary.encode(tokens))
    model = LanguageModel(
        len(vocabulary), args.hidden_size, args.cell, args.num_layers, args.embedding_dim,
        dropout=args.dropout, tokens=vocabulary.tokens, backend=args.backend, dtype=args.dtype,
        seed=args.seed, forget_bias=args.forget_bias,
    )  # fmt: skip
    # Before training, so that a test part that is too short is not found after it.
    test = device_data(parts[2], model, args.batch_size, args.window, "test")
    history = fit(
        model, parts[0], parts[1], epochs=args.epochs, batch_size=args.batch_size,
        optimizer=Adam(args.lr, weight_decay=args.weight_decay), clip_norm=args.clip_norm,
        window=args.window, schedule=cosine_schedule(args.epochs, final=0.01), patience=args.patience,
        keep_best=True, seed=args.seed, checkpoint=args.out, progress=args.progress,
    )  # fmt: skip
    if importlib.util.find_spec("matplotlib"):
        history.plot(Path(args.out) / "loss.png", title=f"{args.cell.upper()} on {args.data}")
    print(f"best epoch {history.best_epoch} of {history.epochs}")
    for name, part in zip(("training", "validation", "test"), (parts[0], parts[1], test), strict=True):
        result = evaluate(model, part, batch_size=args.batch_size, window=args.window)
        print(f"{name:10s}  loss {result.loss:.4f} nats a token, accuracy {100 * result.accuracy:.1f} %")
    print(f"written to {args.out}: best.safetensors, last.safetensors, history.json")
    return 0


def _generate(args: argparse.Namespace) -> int:
    model = load(args.model, backend=args.backend)
    if not isinstance(model, LanguageModel) or model.tokens is None:
        raise ValueError(f"{args.model} holds no language model with tokens, as rnnkit train writes them")
    vocabulary = Vocabulary.from_tokens(model.tokens)
    characters = all(len(token) == 1 for token in vocabulary.tokens if token not in (EOS, UNK))
    characters = characters and (" " in vocabulary or " " not in args.prompt)
    prompt = list(args.prompt) if characters else args.prompt.split()
    stop = None if args.go_on else vocabulary.eos
    numbers = model.generate(
        vocabulary.encode(prompt).tolist(),
        args.length,
        temperature=args.temperature,
        stop=stop,
        seed=args.seed,
    )
    new = [
        ("\n" if args.go_on and token == EOS and not characters else token)
        for token in vocabulary.decode(numbers)
    ]
    separator = "" if characters else " "
    print(separator.join([*prompt, *new]))
    return 0


def _bench(args: argparse.Namespace) -> int:
    try:
        try:
            grid: Any = importlib.import_module("rnnkit.bench.grid")  # installed
        except ModuleNotFoundError as error:
            if error.name not in ("rnnkit.bench", "rnnkit.bench.grid"):
                raise
            grid = importlib.import_module("bench.grid")  # a checkout, run from its root
    except ModuleNotFoundError as error:
        raise ImportError(f'rnnkit bench needs {error.name}: pip install "rnnkit[bench]"') from None
    status: int = grid.main(["--quick", *args.grid_arguments])
    return status


def _warmup(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    kernels.warmup()
    print(f"rnnkit's CPU kernels are compiled and on disk ({time.perf_counter() - start:.1f} s)")
    return 0


def _info(args: argparse.Namespace) -> int:
    print(f"rnnkit {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"processor: {_processor()}, {len(_usable_cores())} cores for this process")
    for package in ("numpy", "array-api-compat", "safetensors", "matplotlib", "numba", "torch", "cupy"):
        print(f"  {package}: {_version_of(package)}")
    print("backends:")
    for name in ("numpy", "torch", "torch:cuda", "cupy"):
        try:
            backend = resolve_backend(name)
            print(f"  {name}: available, device {backend.device}")
            for line in describe_cupy() if name == "cupy" else ():
                print(f"    {line}")
        except (BackendUnavailableError, ValueError) as error:
            print(f"  {name}: {error}")
    backend = resolve_backend(args.backend)
    print(f"kernels for backend {backend.name!r}, hidden size 256:")
    layers: tuple[Any, ...] = (RNN, LSTM, GRU)
    for cell in layers:
        lines = cell(256, 256, backend=backend, dtype=args.dtype, seed=0).explain().split("\n")
        print("\n".join([f"  {cell.__name__}", *(f"  {line}" for line in lines[1:])]))
    return 0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _usable_cores() -> Sequence[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _version_of(package: str) -> str:
    names = ("cupy", "cupy-cuda13x", "cupy-cuda12x") if package == "cupy" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


# --------------------------------------------------------------------------------------------- arguments


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return convert


def _number(low: float, high: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
        if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
            bound = f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(
                f"must be {bound}"
                + (f" and at most {high:g}" if high < float("inf") else "")
                + f", got {text}"
            )
        return value

    return convert


def _cells(text: str) -> list[str]:
    cells = text.split(",")
    if not all(cell in CELLS for cell in cells) or len(set(cells)) != len(cells):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(CELLS)}, got {text!r}")
    return cells


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rnnkit", description="RNN, LSTM and GRU on NumPy, CuPy and PyTorch arrays.")
    parser.add_argument("--version", action="version", version=f"rnnkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, examples: str) -> Any:
        sub = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run, resumes="nothing was changed")
        return sub

    sub = command(
        "compare", _compare, "train an RNN, an LSTM and a GRU on the counting language, beside torch's LSTM",
        "  rnnkit compare\n  rnnkit compare --backend torch --dtype float64\n"
        "  rnnkit compare --cells lstm --hidden-size 8 --max-n 10 --epochs 600 --out runs/gers",
    )  # fmt: skip
    sub.set_defaults(resumes="the same command goes on where it stopped")
    _training_options(
        sub, out="runs/compare", epochs=400, batch_size=16, lr=0.01, hidden_size=50, seed=_COMPARE_SEED
    )
    sub.add_argument(
        "--eps",
        type=_number(0.0, above=True),
        default=_COMPARE_EPS,
        help=f"Adam's eps (default: {_COMPARE_EPS})",
    )
    sub.add_argument(
        "--cells", type=_cells, default=["rnn", "lstm", "gru"], help="comma-separated (default: rnn,lstm,gru)"
    )
    sub.add_argument(
        "--torch",
        action=argparse.BooleanOptionalAction,
        help="train torch's LSTM too (default: where it is installed)",
    )
    sub.add_argument("--restart", action="store_true", help="discard an unfinished comparison in --out")

    sub = command(
        "train", _train, "train one language model on a text file or the counting language",
        "  rnnkit train --data counting --cell gru\n"
        "  rnnkit train --data book.txt --embedding-dim 64 --hidden-size 256 --dropout 0.2 --out runs/book\n"
        "  rnnkit train --data book.txt --level word --vocab-size 5000 --backend cupy",
    )  # fmt: skip
    sub.set_defaults(resumes="the same command goes on where it stopped")
    _training_options(sub, out="runs/train", epochs=20, batch_size=32, lr=0.003, hidden_size=128, seed=0)
    sub.add_argument("--data", default="counting", help='"counting" or a UTF-8 text file (default: counting)')
    sub.add_argument(
        "--level", choices=("char", "word"), default="char", help="tokens of a text (default: char)"
    )
    sub.add_argument("--vocab-size", type=_at_least(3), help="keep this many tokens (default: all)")
    sub.add_argument("--cell", choices=tuple(CELLS), default="lstm", help="default: lstm")
    sub.add_argument("--num-layers", type=_at_least(1), default=1, help="default: 1")
    sub.add_argument(
        "--embedding-dim", type=_at_least(1), help="length of learned vectors (default: one-hot)"
    )
    sub.add_argument("--dropout", type=_number(0.0, 1.0), default=0.0, help="default: 0")
    sub.add_argument("--weight-decay", type=_number(0.0), default=0.0, help="default: 0")
    sub.add_argument(
        "--window", type=_at_least(1), default=64, help="time steps of a batch of a text (default: 64)"
    )
    sub.add_argument("--patience", type=_at_least(1), help="stop after so many epochs without improvement")

    sub = command(
        "generate", _generate, "continue a prompt with a trained model",
        "  rnnkit generate runs/compare/lstm/best.safetensors --prompt aaaab\n"
        '  rnnkit generate runs/book/best.safetensors --prompt "The " --temperature 0.8 --seed 1',
    )  # fmt: skip
    sub.add_argument("model", metavar="MODEL", help="a file that train, compare or rnnkit.save wrote")
    sub.add_argument(
        "--prompt", required=True, help="what to continue: characters, or words for a word model"
    )
    sub.add_argument("--length", type=_at_least(0), default=100, help="tokens to add at most (default: 100)")
    sub.add_argument("--temperature", type=_number(0.0), default=0.0, help="0: the likeliest token (default)")
    sub.add_argument("--go-on", action="store_true", help=f"do not stop at {EOS}")
    sub.add_argument("--seed", type=_at_least(0), help="fixes the drawing")
    sub.add_argument(
        "--backend", help="numpy, cupy, cupy:1, torch, torch:cuda (default: RNNKIT_BACKEND or numpy)"
    )

    sub = command(
        "bench",
        _bench,
        "time this machine: rnnkit against torch and ONNX Runtime on the quick grid",
        "  rnnkit bench\n  rnnkit bench --threads 1 --cells lstm --operations forward,train\n"
        "  rnnkit bench --json here.json\n\n"
        "All options of python -m rnnkit.bench.grid, which shows them with --help, are taken here.",
    )

    command(
        "warmup", _warmup, "compile the CPU kernels now instead of at the first call",
        "  rnnkit warmup",
    )  # fmt: skip

    sub = command(
        "info",
        _info,
        "show versions, backends, devices and kernels",
        "  rnnkit info\n  rnnkit info --backend torch",
    )
    sub.add_argument("--backend", help="whose kernels to show (default: RNNKIT_BACKEND or numpy)")
    sub.add_argument("--dtype", choices=FLOAT_DTYPES, default="float32", help="default: float32")
    return parser


def _training_options(
    sub: argparse.ArgumentParser, *, out: str, epochs: int, batch_size: int, lr: float, hidden_size: int,
    seed: int,
) -> None:  # fmt: skip
    add = sub.add_argument
    add("--out", default=out, help=f"folder for all that is written (default: {out})")
    add("--hidden-size", type=_at_least(1), default=hidden_size, help=f"default: {hidden_size}")
    add(
        "--forget-bias", type=float, help="initial bias of an LSTM's forget gate (default: as torch draws it)"
    )
    add("--num-sequences", type=_at_least(1), default=100, help="of the counting language (default: 100)")
    add("--max-n", type=_at_least(2), default=9, help="of the counting language (default: 9)")
    add("--epochs", type=_at_least(1), default=epochs, help=f"default: {epochs}")
    add("--batch-size", type=_at_least(1), default=batch_size, help=f"default: {batch_size}")
    add("--lr", type=_number(0.0, above=True), default=lr, help=f"learning rate at first (default: {lr})")
    add(
        "--clip-norm",
        type=_number(0.0, above=True),
        default=1.0,
        help="largest norm of the gradient (default: 1)",
    )
    add("--seed", type=_at_least(0), default=seed, help=f"of data, weights and order (default: {seed})")
    add("--backend", help="numpy, cupy, cupy:1, torch, torch:cuda (default: RNNKIT_BACKEND or numpy)")
    add("--dtype", choices=FLOAT_DTYPES, default="float32", help="default: float32")
    add("--no-progress", dest="progress", action="store_false", help="show no progress bars")

"""The command line: flags in, one call out."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import pathlib
import sys
from typing import NamedTuple

from marsjax import __version__


class Command(NamedTuple):
    """A command, the function in `pipeline` that does it, and its own flags."""

    summary: str
    flags: tuple[str, ...] = ()
    needs_config: bool = True


COMMANDS = {
    "inspect": Command("print what the data hold, and every problem found"),
    "run": Command("do all stages for every seed and print the table of methods"),
    "align": Command("train the aligned space; write item and user vectors"),
    "augment": Command("write what every low-active user borrows, as Parquet", ("output",)),
    "train": Command("train and score the CTR model with every method"),
    "export": Command("write a bundle that loads anywhere and gives the same scores", ("output",)),
    "score": Command("score requests (JSON lines) with a bundle", ("bundle", "requests", "output"), False),
}
FLAG_HELP = {
    "output": "where to write (default: in --workdir)",
    "bundle": "folder that `marsjax export` wrote",
    "requests": 'JSON lines: {"user": ID, "items": [ID, ...], "history": [ID, ...] (optional)}',
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong flags, 130 stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_override = [word.startswith("--config.") and "=" in word for word in argv]
    overrides = {
        key.removeprefix("--config."): value
        for key, _, value in (word.partition("=") for word, yes in zip(argv, is_override, strict=True) if yes)
    }
    parser = make_parser()
    arguments = parser.parse_args([word for word, yes in zip(argv, is_override, strict=True) if not yes])
    if arguments.command is None:
        parser.print_help()
        return 2
    command = COMMANDS[arguments.command]
    if arguments.help and not (command.needs_config and arguments.config):
        arguments.parser.print_help()
        return 0
    positional = []
    if command.needs_config:
        from marsjax.configuration import describe, load_config  # here, so that --help answers at once

        try:
            if arguments.config is None:
                raise ValueError("expected --config=FILE[:VARIANT], such as --config=configs/synthetic.py; found none")
            config = load_config(arguments.config, overrides)
        except ValueError as error:
            sys.stderr.write(f"marsjax: error: {error}\n")
            return 2
        if arguments.help:
            arguments.parser.print_help()
            sys.stdout.write(f"\nconfiguration of {arguments.config}:\n{describe(config)}\n")
            return 0
        if arguments.strict:
            config.data.strict = True
        positional = [config, arguments.workdir]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every step of a save
    logging.getLogger("jax").setLevel(logging.WARNING)  # jax tells which backends it looked for
    flags = {flag: getattr(arguments, flag) for flag in command.flags}
    try:
        pipeline = importlib.import_module("marsjax.pipeline")
        return getattr(pipeline, arguments.command)(*positional, **flags) or 0
    except KeyboardInterrupt:
        sys.stderr.write("marsjax: stopped; run the same command again to continue\n")
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MARSJAX_DEBUG"):
            raise
        sys.stderr.write(f"marsjax: error: {error}\n")
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Flags of all commands; --config.KEY=VALUE is taken out before, since argparse cannot know the keys."""
    parser = argparse.ArgumentParser(
        prog="marsjax",
        description="MARS: align item text and images, lend low-active users the relevant part of a similar "
        "high-active user's history, train and export a CTR model on it.",
        epilog="`marsjax COMMAND --help` explains a command; with --config=FILE it lists every configuration key. "
        "MARSJAX_DEBUG=1 shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"marsjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary, add_help=False)
        sub.set_defaults(parser=sub)
        sub.add_argument("-h", "--help", action="store_true", help="this text; with --config also every key")
        if command.needs_config:
            sub.add_argument("--config", metavar="FILE[:VARIANT]", help="Python file with get_config(variant)")
            sub.add_argument("--config.KEY", metavar="VALUE", dest="_key", help="overrides one value of it")
            sub.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/default"), metavar="DIR",
                             help="results, checkpoints and finished stages (default: %(default)s)")  # fmt: skip
            sub.add_argument("--strict", action="store_true", help="refuse bad rows instead of dropping them")
        for flag in command.flags:
            kind = "FILE" if flag == "requests" else "PATH"
            sub.add_argument(f"--{flag}", type=pathlib.Path, metavar=kind, help=FLAG_HELP[flag])
    return parser


if __name__ == "__main__":
    sys.exit(main())

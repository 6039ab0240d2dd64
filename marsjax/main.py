"""The command line: flags in, one call out."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import shlex
import sys
from typing import NamedTuple

from marsjax import __version__
from marsjax.allocator import keep_freed_memory
from marsjax.compilation import keep_compiled
from marsjax.configuration import describe, load_config, split_overrides, with_overrides
from marsjax.defaults import default_config


class Command(NamedTuple):
    """What a command, the function of that name in `commands`, says of itself, and its own flags."""

    summary: str
    details: str
    flags: tuple[str, ...] = ()
    needs_config: bool = True
    hosts: bool = False  # several processes can do it together
    serves: bool = False  # reads the section `serving` alone, so that the defaults do without a file


# fmt: off
COMMANDS = {
    "inspect": Command("print what the data hold, and every problem found",
                       "Reads, checks and splits the data; trains and writes nothing."),
    "features": Command("encode item texts and images; write one array a modality",
                        "Writes text.npz, image.npz and manifest.json. Continues where it was stopped, and encodes "
                        "again only what has changed. `marsjax run` with the same flags does this first.", ("output",)),
    "run": Command("do all stages for every seed and print the table of methods",
                   "Writes results.json and results.md. Stages that --workdir holds finished for the same values "
                   "and data are skipped; one that was stopped continues.", hosts=True),
    "reproduce": Command("run the study (the paper's section 4 and more) and write the report",
                         "Writes report.html, report.md and cells/*.json. Cells that are finished are not run again; "
                         "each is every method for every seed, so a part can take hours.",
                         ("quick", "parts", "methods", "processes")),
    "align": Command("train the aligned space; write item and user vectors",
                     "Writes one embeddings.npz a seed, with item_ND and user_UD.", hosts=True),
    "augment": Command("write what every low-active user borrows, as Parquet",
                       "Aligns first where that is not done. Uses the first seed.", ("output",)),
    "train": Command("train and score the CTR model with every method",
                     "Does what must come before where that is not done; `marsjax run` prints the table.", hosts=True),
    "export": Command("write a bundle that loads anywhere and gives the same scores",
                      "Bundles the model of config.export.method and the first seed, and trains it if need be.",
                      ("output",)),
    "score": Command("score requests (JSON lines) with a bundle",
                     "Needs no configuration: the bundle holds the one it was trained with.",
                     ("bundle", "requests", "output"), False),
    "publish": Command("make a bundle the one that is served from --root",
                       "Copies it into --root, points to it and removes old versions.", ("bundle", "root"),
                       serves=True),
    "rollback": Command("serve the version again that was served before", "Nothing is removed.", ("root",),
                        serves=True),
    "serve": Command("answer requests over HTTP with what --root serves",
                     "POST /v1/score, /v1/augment, /v1/events; GET /healthz, /readyz, /metrics, /explain, "
                     "/openapi.json. Follows what is published without a restart.", ("root",), serves=True),
    "runner": Command("take events into histories, user vectors, donors and the model",
                      "Beside `marsjax serve`, with the same --root and config.serving.storage.", ("root",),
                      serves=True),
    "rebuild": Command("make vectors of all users in the store anew, on Ray Data if need be",
                       "Beside `marsjax runner`. --output keeps histories and vectors in shards; shards that are there "
                       "are taken as they are, so that a job that was stopped goes on.", ("root", "output"),
                       serves=True),
}
# fmt: on
FLAG_HELP = {
    "output": "where to write (default: in --workdir; for score, beside the requests; for rebuild, none)",
    "quick": "a small version: some users, one seed, one epoch, few cells",
    "methods": "compare these alone, joined by commas, with the base (default: all)",
    "processes": "so many train side by side, each on its share of the processors; they share a GPU (default: 1)",
    "parts": "run these alone, in this order, joined by commas: table1, table2_ids, sparse_strong, ... (default: all)",
    "bundle": "folder that `marsjax export` wrote",
    "root": "folder of published versions, and of what serving writes",
    "requests": 'JSON lines: {"user": ID, "items": [ID, ...]}, and if you like "history": [ID, ...] and "time": NUMBER',
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 failed, 2 wrong flags, 130 stopped."""
    try:
        overrides, words = split_overrides(sys.argv[1:] if argv is None else argv)
        arguments = make_parser().parse_args(words or ["--help"])
        command, config = COMMANDS[arguments.command], None
        if command.needs_config and arguments.config:
            strict = {"data.strict": "true"} if getattr(arguments, "strict", False) else {}
            config = load_config(arguments.config, overrides | strict)
        elif command.serves:
            config = with_overrides(default_config(), overrides)
        elif command.needs_config and not arguments.help:
            raise ValueError("expected --config=FILE[:VARIANT], such as --config=configs/synthetic.py; found none")
        elif overrides:
            raise ValueError(f"expected no --config.{next(iter(overrides))} without a --config=FILE that it overrides")
    except ValueError as error:
        return fail(error, code=2)
    together = command.hosts and arguments.coordinator is not None
    if command.hosts and not together and (arguments.num_processes, arguments.process_id) != (None, None):
        return fail(ValueError("expected --coordinator beside --num_processes and --process_id, found none"), code=2)
    if arguments.help:
        arguments.parser.print_help()
        if config is not None:
            file = (arguments.config or "the defaults").partition(":")[0]
            sources = (*([file] if arguments.config else []), pathlib.Path(__file__).with_name("defaults.py"))
            lines = describe(config, *sources).splitlines()
            shown = [line for line in lines if not command.serves or line.startswith("  --config.serving.")]
            sys.stdout.write(f"\nconfiguration of {arguments.config or file}:\n" + "\n".join(shown) + "\n")
        return 0
    from marsjax.progress import log_to  # here, as it loads rich, and --help answers at once

    log_to(sys.stderr)
    keep_freed_memory()
    if command.needs_config and not command.serves:
        keep_compiled(arguments.workdir)
    try:
        if together:
            from marsjax import hosts  # here, as it loads jax

            hosts.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
        commands = importlib.import_module("marsjax.commands")  # here, so that --help answers at once
        positional = (config,) if command.serves else (config, arguments.workdir) if command.needs_config else ()
        flags = {flag: getattr(arguments, flag) for flag in command.flags}
        if arguments.command in ("run", "reproduce"):
            flags["command"] = shlex.join(["marsjax", *(sys.argv[1:] if argv is None else argv)])
        return getattr(commands, arguments.command)(*positional, **flags) or 0
    except KeyboardInterrupt:
        sys.stderr.write("marsjax: stopped; run the same command again to continue\n")
        return 130
    except (ValueError, OSError, ImportError) as error:
        code = fail(error, code=1)
        if together:
            hosts.leave(code)
        return code
    except RuntimeError as error:  # of a collective, where another process is gone
        if not together:
            raise
        told = f"{str(error).splitlines()[0]}; where another process ended, start all of them again to continue"
        hosts.leave(fail(RuntimeError(told), code=1))


def fail(error: Exception, *, code: int) -> int:
    """Tells the error in one line, or raises it where a traceback was asked for."""
    if os.environ.get("MARSJAX_DEBUG"):
        raise error
    sys.stderr.write(f"marsjax: error: {error}\n")
    return code


def make_parser() -> argparse.ArgumentParser:
    """Flags of all commands but --config.KEY=VALUE, which is taken out before: argparse cannot know the keys."""
    parser = argparse.ArgumentParser(
        prog="marsjax",
        description="MARS: align item text and images, lend low-active users the relevant part of a similar "
        "high-active user's history, train and export a CTR model on it.",
        epilog="`marsjax COMMAND --help` explains a command; with --config=FILE it lists every configuration key. "
        "MARSJAX_DEBUG=1 shows the traceback of an error.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=f"marsjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        example = (
            " ".join(f"--{flag}=DIR" for flag in command.flags)
            if command.serves
            else "--config=configs/synthetic.py"
            if command.needs_config
            else "--bundle=DIR --requests=FILE.jsonl"
        )
        about = f"{command.summary[0].upper()}{command.summary[1:]}. {command.details}"
        keys = "; with --config=FILE also every configuration key" if command.needs_config else ""
        sub = commands.add_parser(name, help=command.summary, description=about, add_help=False, allow_abbrev=False,
                                  epilog=f"example: marsjax {name} {example}")  # fmt: skip
        sub.set_defaults(parser=sub)
        sub.add_argument("-h", "--help", action="store_true", help=f"this text{keys}")
        if command.serves:
            sub.add_argument("--config", metavar="FILE[:VARIANT]", help="Python file; its section `serving` counts")
            sub.add_argument(
                "--config.serving.KEY", metavar="VALUE", help="overrides one value of it or of the defaults"
            )
        elif command.needs_config:
            sub.add_argument("--config", metavar="FILE[:VARIANT]", help="Python file with get_config(variant)")
            sub.add_argument("--config.KEY", metavar="VALUE", help="overrides one value of it")
            sub.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/default"), metavar="DIR",
                             help="results, checkpoints and finished stages (default: %(default)s)")  # fmt: skip
            sub.add_argument("--strict", action="store_true", help="refuse bad rows instead of dropping them")
        if command.hosts:
            sub.add_argument(
                "--coordinator",
                metavar="HOST:PORT|auto",
                help="train with other processes: the address of the first one, or what the cluster says",
            )
            sub.add_argument("--num_processes", type=int, metavar="N", help="how many they are, with --coordinator")
            sub.add_argument("--process_id", type=int, metavar="K", help="which of them this is, from 0")
        for flag in command.flags:
            if flag == "quick":
                sub.add_argument("--quick", action="store_true", help=FLAG_HELP[flag])
            elif flag == "processes":
                sub.add_argument("--processes", type=int, default=1, metavar="N", help=FLAG_HELP[flag])
            elif flag in ("parts", "methods"):
                sub.add_argument(f"--{flag}", default="", metavar="NAMES", help=FLAG_HELP[flag])
            else:
                kind = "FILE" if flag == "requests" else "PATH"
                sub.add_argument(f"--{flag}", type=pathlib.Path, metavar=kind, help=FLAG_HELP[flag])
    return parser


if __name__ == "__main__":
    sys.exit(main())

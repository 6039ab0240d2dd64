"""The command line: help, configurations read and refused by name, exit codes. No stage is run here."""

import json
import logging
import subprocess
import sys
import types

import pytest
from ml_collections import ConfigDict

from marsjax import __version__, configuration, main

CONFIG = """
from ml_collections import ConfigDict, config_dict

def get_config(variant=""):
    config = ConfigDict()
    config.seeds = (0,)  # one run for each
    config.data = data = ConfigDict()
    data.folder = "here"
    data.strict = False  # refuse bad rows
    data.title = config_dict.placeholder(str)
    config.ctr = ctr = ConfigDict()
    ctr.batch_size = 512
    ctr.learning_rate = 1e-3
    ctr.tower = (200, 80)
    ctr.rates = (0.5,)
    if variant == "small":
        ctr.batch_size = 8
    elif variant:
        raise ValueError(f"unknown variant {variant!r}; expected small")
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def commands(monkeypatch):
    """Stands in for marsjax.commands; `calls` holds what its functions were given, `outcome` is what they do."""
    calls, outcome = [], [None]

    def command(*positional, **flags):
        calls.append((positional, flags))
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    fake = types.ModuleType("marsjax.commands")
    for name in main.COMMANDS:
        setattr(fake, name, command)
    monkeypatch.setitem(sys.modules, "marsjax.commands", fake)
    monkeypatch.setattr(main, "keep_freed_memory", lambda: None)  # of this process, which is the tests'
    monkeypatch.delenv("MARSJAX_DEBUG", raising=False)
    levels = {name: logging.getLogger(name).level for name in ("absl", "jax")}
    yield types.SimpleNamespace(calls=calls, outcome=outcome)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def call(*words):
    """The exit code, whether returned or raised by argparse."""
    try:
        return main.main(list(words))
    except SystemExit as end:
        return end.code


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_names_every_command(words, capsys):
    assert call(*words) == 0
    out = capsys.readouterr().out
    assert all(f"    {name} " in out for name in main.COMMANDS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command_has_usage_flags_and_an_example(name, capsys):
    assert call(name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: marsjax {name}" in out
    assert f"example: marsjax {name} --" in out
    expected = ["--config FILE", "--workdir", "--strict"] if main.COMMANDS[name].needs_config else ["--bundle"]
    expected = ["--config FILE", "--config.serving.port=8080"] if main.COMMANDS[name].serves else expected
    for flag in [*expected, *(f"--{flag}" for flag in main.COMMANDS[name].flags)]:
        assert flag in out


def test_serving_needs_no_file_and_takes_one(tmp_path, commands):
    file = tmp_path / "config.py"
    file.write_text("from marsjax.defaults import default_config\n\n\ndef get_config():\n    return default_config()\n")
    assert call("publish", "--bundle=b", f"--root={tmp_path}", "--config.serving.keep=2") == 0
    assert call("serve", f"--root={tmp_path}", f"--config={file}", "--config.serving.port=9") == 0
    ((config,), flags), ((of_file,), _) = commands.calls
    assert (config.serving.keep, flags["root"], str(flags["bundle"])) == (2, tmp_path, "b")
    assert (of_file.serving.port, of_file.serving.keep) == (9, 5)
    assert call("serve", "--config.serving.ports=1") == 2


def test_every_command_is_a_function_of_the_pipeline():
    from marsjax import commands

    assert all(callable(getattr(commands, name)) for name in main.COMMANDS)


def test_help_with_a_config_lists_keys_values_and_explanations(config_file, capsys):
    assert call("run", f"--config={config_file}:small", "--config.seeds=3,4", "--help") == 0
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert "--config.ctr.batch_size=8" in lines
    assert "--config.seeds=3,4 # one run for each" in lines
    assert "--config.data.strict=False # refuse bad rows" in lines


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"marsjax {__version__}\n"


def test_help_and_refusals_load_no_jax(config_file):
    # What makes --help slow is importing jax; a limit in seconds would fail on a busy machine.
    code = (
        "import sys; from marsjax.main import main; "
        f"assert main(['run', '--config={config_file}', '--help']) == 0; "
        f"assert main(['run', '--config={config_file}', '--config.ctr.x=1']) == 2; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'marsjax.commands')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


# --- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.data.foldr=x"], "unknown config key data.foldr; did you mean data.folder?"),
        (["--config.dta.folder=x"], "unknown config key dta.folder; did you mean data.folder?"),
        (["--config.folder=x"], "unknown config key folder; did you mean data.folder?"),
        (["--config.zzzzzzzzzz=x"], "unknown config key zzzzzzzzzz; `--config=FILE --help` lists every key"),
        (["--config.seeds.first=1"], "unknown config key seeds.first; did you mean seeds?"),
        (["--config.ctr.batch_size=1.5"], "config.ctr.batch_size expects int (a whole number), got '1.5'"),
        (["--config.ctr.batch_size", "many"], "config.ctr.batch_size expects int (a whole number), got 'many'"),
        (["--config.ctr.batch_size="], "config.ctr.batch_size expects int (a whole number), got ''"),
        (["--config.ctr.learning_rate=nan"], "config.ctr.learning_rate expects float (a finite number), got 'nan'"),
        (["--config.ctr.learning_rate=-inf"], "config.ctr.learning_rate expects float (a finite number), got '-inf'"),
        (["--config.ctr.learning_rate=1e999"], "config.ctr.learning_rate expects float (a finite number), got '1e999'"),
        (["--config.ctr.learning_rate=none"], "config.ctr.learning_rate expects float (a finite number), got 'none'"),
        (["--config.ctr.tower=8,x"], "config.ctr.tower expects int (a whole number), got 'x'"),
        (["--config.ctr.rates=0.1,inf"], "config.ctr.rates expects float (a finite number), got 'inf'"),
        (["--config.data.strict=maybe"], "config.data.strict expects bool (true or false), got 'maybe'"),
        (["--config.data.strict", "--strict"], "--config.data.strict: expected --config.data.strict=VALUE, found no"),
        (["--config.data.strict"], "--config.data.strict: expected --config.data.strict=VALUE, found no value"),
        (["--config.ctr=1"], "config.ctr is a section; set one of ctr.batch_size, ctr.learning_rate, ctr.rates"),
    ],
)  # fmt: skip
def test_wrong_overrides_are_refused_by_name(words, message, config_file, commands, capsys):
    assert call("run", f"--config={config_file}", *words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"marsjax: error: {message}")
    assert "Traceback" not in err
    assert (out, commands.calls) == ("", [])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("ctr.batch_size", "64", 64),
        ("ctr.batch_size", "-1", -1),
        ("ctr.learning_rate", "1", 1.0),
        ("ctr.tower", "8,4", (8, 4)),
        ("ctr.tower", "(8, 4)", (8, 4)),
        ("ctr.tower", "8", (8,)),
        ("ctr.tower", "", ()),
        ("ctr.rates", "1,2", (1.0, 2.0)),
        ("data.strict", "true", True),
        ("data.strict", "False", False),
        ("data.folder", "none", "none"),  # a string like any other, where the field is no placeholder
        ("data.folder", "a=b, c:d", "a=b, c:d"),
        ("data.folder", "", ""),
        ("data.title", "name", "name"),
        ("data.title", "none", None),
    ],
)
@pytest.mark.parametrize("separator", ["=", " "])
def test_overrides_take_the_type_of_the_field(key, text, value, separator, config_file, commands):
    words = [f"--config.{key}={text}"] if separator == "=" else [f"--config.{key}", text]
    assert call("run", f"--config={config_file}", *words) == 0
    (config, _), _ = commands.calls[0]
    found = config
    for name in key.split("."):
        found = found[name]
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(part) for part in found] == [type(part) for part in value]


def test_a_placeholder_that_was_set_can_be_none_again(config_file):
    config = configuration.load_config(config_file, {"data.title": "name"})
    configuration.override(config, "data.title", "none")
    assert config.data.title is None


def test_the_last_override_counts(config_file):
    overrides, rest = configuration.split_overrides(
        ["run", "--config.a=1", "--config=f", "--config.a", "2", "--strict"]
    )
    assert overrides == {"a": "2"}
    assert rest == ["run", "--config=f", "--strict"]


def test_the_config_a_command_gets_is_locked(config_file, commands):
    assert call("run", f"--config={config_file}") == 0
    (config, _), _ = commands.calls[0]
    with pytest.raises(AttributeError):
        config.ctr.batchsize = 3


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        (CONFIG, ":smal", "unknown variant 'smal'; expected small"),
        ("def get_config():\n    return 1", ":small", "get_config() has no variants, found 'small'"),
        ("def get_config():\n    return {}", "", "get_config must return an ml_collections.ConfigDict, found dict"),
        ("x = 1", "", "expected a function get_config(variant), found none"),
        ("def get_config(:", "", "SyntaxError: "),
        ("import no_such_package", "", "ModuleNotFoundError: No module named 'no_such_package'"),
        (CONFIG.replace("return config", "config.lock().ctr.batchsize = 1"), "", "AttributeError: "),
        (CONFIG.replace("return config", "config.ctr.batch_size = 'many'"), "", "TypeError: "),
    ],
)
def test_config_files_that_fail_are_named_without_a_traceback(text, variant, message, tmp_path, commands, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert call("run", f"--config={path}{variant}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"marsjax: error: {path}: {message}")
    assert "Traceback" not in err


def test_a_nan_in_the_file_itself_is_refused(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.replace("(0.5,)", "(0.5, float('nan'))"))
    assert call("run", f"--config={path}") == 2
    assert "config.ctr.rates expects a finite number, got nan" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing.py", "", "folder.py"])
def test_a_missing_config_file_is_named(name, tmp_path, capsys):
    (tmp_path / "folder.py").mkdir()
    assert call("run", f"--config={tmp_path / name}") == 2
    assert f"found no such Python file '{tmp_path / name}'" in capsys.readouterr().err


def test_fingerprints_follow_the_values_and_not_the_order():
    one = ConfigDict({"a": 1, "b": {"c": (1, 2)}})
    other = ConfigDict({"b": {"c": (1, 2)}, "a": 1})
    assert configuration.to_json(one) == {"a": 1, "b": {"c": [1, 2]}}
    assert json.loads(json.dumps(configuration.to_json(one))) == configuration.to_json(one)
    assert configuration.fingerprint(one, 0) == configuration.fingerprint(other, 0)
    assert configuration.fingerprint({"a": 1, "b": 2}) == configuration.fingerprint({"b": 2, "a": 1})
    other.b.c = (2, 1)
    assert configuration.fingerprint(one, 0) != configuration.fingerprint(other, 0)
    assert configuration.fingerprint(one, 0) != configuration.fingerprint(one, 1)
    assert configuration.fingerprint("ab", "c") != configuration.fingerprint("a", "bc")
    assert len(bytes.fromhex(configuration.fingerprint())) == 32


# --- flags and exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["run", "--wrokdir=x"], "unrecognized arguments: --wrokdir=x"),
        (["run", "--work=x"], "unrecognized arguments: --work=x"),  # no abbreviations
        (["run"], "expected --config=FILE[:VARIANT]"),
        (["run", "--config.a=1", "--help"], "expected no --config.a without a --config=FILE"),
        (["score", "--config.a=1"], "expected no --config.a without a --config=FILE"),
        (["score", "--config=x.py"], "unrecognized arguments: --config=x.py"),
    ],
)
def test_wrong_flags_end_with_2(words, message, commands, capsys):
    assert call(*words) == 2
    assert message in capsys.readouterr().err
    assert commands.calls == []


def test_flags_reach_the_pipeline(config_file, tmp_path, commands):
    assert call("export", f"--config={config_file}:small", f"--workdir={tmp_path}", "--strict", "--output=o") == 0
    assert call("score", "--bundle=b", "--requests", "r.jsonl") == 0
    ((config, workdir), flags), (positional, score_flags) = commands.calls
    assert (config.ctr.batch_size, config.data.strict, workdir) == (8, True, tmp_path)
    assert {name: str(value) for name, value in flags.items()} == {"output": "o"}
    assert positional == ()
    assert {name: str(value) for name, value in score_flags.items()} == {
        "bundle": "b", "requests": "r.jsonl", "output": "None",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (ValueError("expected 1, found 2"), 1, "marsjax: error: expected 1, found 2\n"),
        (OSError(28, "no space left while writing x"), 1, "marsjax: error: [Errno 28] no space left while writing x\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "marsjax: error: [Errno 2] No such file: 'x'\n"),
        (ImportError("pip install marsjax[tabular]"), 1, "marsjax: error: pip install marsjax[tabular]\n"),
        (KeyboardInterrupt(), 130, "marsjax: stopped; run the same command again to continue\n"),
    ],
)
def test_exit_codes(outcome, code, message, config_file, commands, capsys):
    commands.outcome[0] = outcome
    assert call("run", f"--config={config_file}") == code
    assert capsys.readouterr().err == message


def test_errors_of_the_program_keep_their_traceback(config_file, commands, monkeypatch):
    commands.outcome[0] = KeyError("a bug")
    with pytest.raises(KeyError):
        main.main(["run", f"--config={config_file}"])
    commands.outcome[0] = ValueError("shown in full on request")
    monkeypatch.setenv("MARSJAX_DEBUG", "1")
    with pytest.raises(ValueError, match="in full"):
        main.main(["run", f"--config={config_file}"])

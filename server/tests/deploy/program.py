"""The program that the deployed files start, and what it says of itself."""

import functools
import os
import re
import subprocess
from pathlib import Path

BIN = os.environ["TIDEMILL_BIN"]
ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "server" / "deploy"
GRPC_PORT, HTTP_PORT = 50051, 8000


def run(*arguments, **environment):
    """The finished process; options come from these arguments and this environment alone."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
    return subprocess.run([BIN, *arguments], env={**clean, **environment}, capture_output=True, text=True, timeout=60)


@functools.cache
def help_of(command):
    """What `--help` says of a command."""
    return run(command, "--help").stdout


def options_of(command):
    """The long options that a command knows."""
    return set(re.findall(r"^\s+(?:-\w, )?(--[a-z][a-z-]+)", help_of(command), re.MULTILINE))


def variables():
    """The environment variables that `serve` reads."""
    return set(re.findall(r"\[env:\s+(TIDEMILL_[A-Z0-9_]+)", help_of("serve")))


def check_options(arguments):
    """The arguments are those of a command of the program, and every option is one of that command."""
    command, *rest = arguments
    assert command in ("serve", "gateway"), arguments
    used = {argument.partition("=")[0] for argument in rest if argument.startswith("--")}
    assert used <= options_of(command), f"{command} does not know {used - options_of(command)}"


def value_of(arguments, option):
    """What an option is set to, in either form; None without it."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            return value if equals else arguments[place + 1]
    return None


def default_of(option):
    """The default of an option of `serve`, from its help."""
    found = re.search(rf"^\s+{option} <.*?\[default:\s+([^\]]+)\]", help_of("serve"), re.MULTILINE | re.DOTALL)
    assert found, f"{option} has no default"
    return found[1]


# What `serve` may take after --shutdown-timeout: streams, the device and the log get 5 seconds each (FLUSH in server/src/serve.rs).
FLUSH_SECONDS = 15

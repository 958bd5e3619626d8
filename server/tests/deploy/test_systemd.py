"""The unit for systemd: it is one, it is fenced, and its exit codes and times are those of the program."""

import configparser
import re
import shutil
import subprocess
import tomllib

import pytest
from program import BIN, DEPLOY, FLUSH_SECONDS, check_options, help_of, options_of, run, variables

UNIT = DEPLOY / "systemd" / "tidemill.service"
# Out of 10: what systemd-analyze calls well protected is below 3.
MAX_EXPOSURE = 20


class Unit(configparser.RawConfigParser):
    """A unit file: names are as they are, and may come twice (the last one counts here)."""

    def __init__(self):
        super().__init__(strict=False, delimiters=("=",), comment_prefixes=("#", ";"), interpolation=None)

    def optionxform(self, name):
        return name


@pytest.fixture(scope="module")
def service():
    """The section [Service]."""
    unit = Unit()
    unit.read(UNIT)
    return unit["Service"]


@pytest.fixture(scope="module")
def options():
    """tidemill.toml."""
    return tomllib.loads((DEPLOY / "systemd" / "tidemill.toml").read_text())


def analyze(*arguments):
    """Runs systemd-analyze; a machine without it leaves the test out and says so."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze on this machine (on Debian: apt-get install systemd)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def here(tmp_path):
    """The unit with the program of this machine: systemd looks whether it is there."""
    text = UNIT.read_text()
    assert text.count("/usr/local/bin/tidemill") == 1
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace("/usr/local/bin/tidemill", BIN))
    return unit


def test_systemd_accepts_it(here):
    result = analyze("verify", "--man=no", str(here))
    complaints = [line for line in result.stderr.splitlines() if here.name in line]
    assert result.returncode == 0 and not complaints, result.stderr


def test_it_is_fenced(here):
    result = analyze("security", "--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager", str(here))
    if "unrecognized option" in result.stderr:
        pytest.skip(f"this systemd-analyze is too old to judge a file: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_it_starts_is_the_server_with_options_that_it_has(service, options):
    program, *arguments = service["ExecStart"].split()
    assert program.endswith("/tidemill")
    check_options(arguments)
    known = {option.removeprefix("--") for option in options_of("serve")}
    assert set(options) <= known, set(options) - known


def test_the_program_accepts_the_options(tmp_path):
    """The model is not there; that it is looked for means that everything before was right."""
    text = (DEPLOY / "systemd" / "tidemill.toml").read_text()
    config = tmp_path / "tidemill.toml"
    config.write_text(text)
    variable, _, key = environment_lines()[0].partition("=")
    result = run("serve", "--config", str(config), "--host", "127.0.0.1", "--grpc-port", "0", "--port", "0", **{variable: key})
    assert result.returncode == 3, result.stderr
    assert tomllib.loads(text)["model"] in result.stderr


def test_without_a_key_it_does_not_open_itself_to_the_network():
    result = run("serve", "--config", str(DEPLOY / "systemd" / "tidemill.toml"))
    assert result.returncode == 2 and "--api-key" in result.stderr


def environment_lines():
    """The settings of tidemill.env."""
    lines = (DEPLOY / "systemd" / "tidemill.env").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_environment_has_the_key_and_nothing_unknown(service):
    names = [line.partition("=")[0] for line in environment_lines()]
    assert "TIDEMILL_API_KEY" in names and set(names) <= variables()
    assert service["Environment"].partition("=")[0] in variables()
    assert service["EnvironmentFile"].endswith("/tidemill.env")


def test_exit_codes_that_a_restart_cannot_mend_do_not_restart(service):
    codes = {int(code): text for code, text in re.findall(r"^\s+(\d+)\s{2,}(\S.*)$", help_of("serve"), re.MULTILINE)}
    assert set(codes) == {0, 1, 2, 3, 4, 5, 6, 130}, "a new exit code needs a place in the unit"
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"].split() == ["2", "3"]
    assert "wrong usage" in codes[2] and "model" in codes[3]
    assert service["SuccessExitStatus"] == "130" and "signal" in codes[130]


def test_running_requests_may_finish_before_systemd_kills(service, options):
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) >= float(options["shutdown-timeout"]) + FLUSH_SECONDS

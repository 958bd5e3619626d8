"""The Dockerfile: its stages, its user, and the options that it starts the server with."""

import json
import re

from program import DEPLOY, GRPC_PORT, HTTP_PORT, ROOT, check_options, run

DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


def instructions():
    """(name, arguments) of every instruction; continued lines are one."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def last_stage():
    """Instructions after the last FROM."""
    stages = [place for place, (name, _) in enumerate(instructions()) if name == "FROM"]
    return instructions()[stages[-1] :], len(stages)


def values(name):
    """What the last stage says to an instruction."""
    return [arguments for found, arguments in last_stage()[0] if found == name]


def test_the_image_holds_the_program_and_not_what_built_it():
    _, stages = last_stage()
    assert stages == 2
    assert any("--from=build" in copied and copied.endswith("/usr/local/bin/tidemill") for copied in values("COPY"))


def test_it_does_not_run_as_root_and_says_so_by_number():
    (user,) = values("USER")
    assert user.isdigit() and int(user) > 0, "Kubernetes cannot tell from a name"
    assert any(f"--uid {user}" in line for line in values("RUN"))


def test_it_starts_the_server_and_is_not_open_to_everybody():
    (entry,), (command,) = values("ENTRYPOINT"), values("CMD")
    assert json.loads(entry) == ["/usr/local/bin/tidemill"]
    check_options(json.loads(command))
    result = run(*json.loads(command))
    assert result.returncode == 2 and "--api-key" in result.stderr, "without a key it says what to do"


def test_ports_and_signal_are_those_of_the_program():
    assert values("EXPOSE") == [f"{HTTP_PORT} {GRPC_PORT}"]
    assert values("STOPSIGNAL") == ["SIGTERM"]


def test_what_it_copies_is_there_and_what_it_builds_with_is_what_we_need():
    for name, arguments in instructions():
        if name == "COPY" and "--from" not in arguments:
            assert (ROOT / arguments.split()[0]).exists(), arguments
    version = re.search(r'rust-version = "([^"]+)"', (ROOT / "Cargo.toml").read_text())[1]
    assert f"FROM rust:{version}-" in DOCKERFILE.read_text()
    assert "--locked" in DOCKERFILE.read_text()


def test_what_was_built_here_stays_here():
    ignored = (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"/target", "/.git", "/.venv*"} <= set(ignored)

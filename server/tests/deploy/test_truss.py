"""The configurations for Truss, as the real package reads them."""

import pytest
import yaml
from program import DEPLOY, GRPC_PORT, HTTP_PORT, check_options, value_of, variables
from truss.base.truss_config import TransportKind, TrussConfig

FILES = {kind: DEPLOY / f"truss-{kind}" / "config.yaml" for kind in ("http", "grpc")}


@pytest.fixture(params=FILES)
def kind(request):
    return request.param


@pytest.fixture
def config(kind):
    return TrussConfig.from_yaml(FILES[kind])


def test_truss_reads_it_and_keeps_what_it_says(kind, config):
    written = yaml.safe_load(FILES[kind].read_text())
    read = config.to_dict(verbose=True)
    for section in ("docker_server", "base_image", "runtime", "resources", "environment_variables"):
        for name, value in written[section].items():
            # Truss completes sections within sections.
            if isinstance(value, dict):
                assert value.items() <= read[section][name].items(), name
            else:
                assert read[section][name] == value, name


@pytest.mark.parametrize("wrong", [{"docker_server": {"server_port": "here"}}, {"runtime": {"transport": {"kind": "post"}}}])
def test_truss_would_notice(kind, wrong, tmp_path):
    written = yaml.safe_load(FILES[kind].read_text())
    for section, value in wrong.items():
        written[section] |= value
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(written))
    with pytest.raises(ValueError):
        TrussConfig.from_yaml(file)


def test_the_server_is_started_with_options_that_it_has(config):
    program, *arguments = config.docker_server.start_command.split()
    assert program == "/usr/local/bin/tidemill"
    check_options(arguments)
    assert value_of(arguments, "--host") == "0.0.0.0"
    assert set(config.environment_variables) <= variables()


def test_it_runs_as_the_user_of_our_image(config):
    assert f"USER {config.docker_server.run_as_user_id}\n" in (DEPLOY / "docker" / "Dockerfile").read_text()


def test_http_is_routed_to_our_routes():
    server = TrussConfig.from_yaml(FILES["http"]).docker_server
    assert server.server_port == HTTP_PORT
    assert (server.predict_endpoint, server.readiness_endpoint, server.liveness_endpoint) == (
        "/predict",
        "/ready",
        "/health",
    )


def test_grpc_is_the_transport_of_the_other():
    config = TrussConfig.from_yaml(FILES["grpc"])
    assert config.runtime.transport.kind == TransportKind.GRPC
    assert config.docker_server.server_port == GRPC_PORT
    assert TrussConfig.from_yaml(FILES["http"]).runtime.transport.kind == TransportKind.HTTP

"""The manifests for Kubernetes: valid by its schemas, and in keeping with the program."""

import kubernetes_validate
import pytest
import yaml
from program import (
    DEPLOY,
    FLUSH_SECONDS,
    GRPC_PORT,
    HTTP_PORT,
    check_options,
    default_of,
    value_of,
    variables,
)

FILES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# `lifecycle.preStop.sleep` is there since 1.30.
VERSIONS = ["1.30", "1.37"]
PROBES = {"livenessProbe": "/health", "readinessProbe": "/ready"}


def documents(file):
    return list(yaml.safe_load_all(file.read_text()))


def of_kind(file, kind):
    """The only document of a kind."""
    (found,) = [document for document in documents(file) if document["kind"] == kind]
    return found


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def file(request):
    return request.param


@pytest.fixture
def pod(file):
    """The specification of a deployment's pods."""
    return of_kind(file, "Deployment")["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


def test_there_are_manifests():
    assert [file.name for file in FILES] == ["tidemill-gpu.yaml", "tidemill.yaml"]


@pytest.mark.parametrize("version", VERSIONS)
def test_valid_by_the_schema(file, version):
    for document in documents(file):
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_would_notice(file, version):
    document = of_kind(file, "Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, version, strict=True)


def test_arguments_and_variables_are_known(container):
    check_options(container["args"])
    assert {variable["name"] for variable in container["env"]} <= variables()


def test_the_key_is_a_secret(container):
    (key,) = [variable for variable in container["env"] if variable["name"] == "TIDEMILL_API_KEY"]
    assert "value" not in key and key["valueFrom"]["secretKeyRef"]["key"]
    assert value_of(container["args"], "--host") == "0.0.0.0"
    assert not any("insecure" in argument for argument in container["args"])


def test_ports_are_those_of_the_program(container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": HTTP_PORT, "grpc": GRPC_PORT}
    assert int(default_of("--port")) == HTTP_PORT and int(default_of("--grpc-port")) == GRPC_PORT
    assert not {"--port", "--grpc-port"} & {argument.partition("=")[0] for argument in container["args"]}


def test_probes_ask_what_stays_open_with_a_key(container):
    for name, path in PROBES.items():
        probe = container[name]
        if "grpc" in probe:
            assert probe["grpc"] == {"port": GRPC_PORT}
        else:
            assert probe["httpGet"] == {"path": path, "port": "http"}


def test_requests_may_finish_before_the_pod_is_killed(pod, container):
    timeout = float(value_of(container["args"], "--shutdown-timeout"))
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + timeout + FLUSH_SECONDS


def test_pods_have_no_more_rights_than_they_need(pod, container):
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] and not own["allowPrivilegeEscalation"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False
    for variable in container["env"]:
        if variable["name"] == "TIDEMILL_KERNEL_CACHE":
            assert any(variable["value"].startswith(mount["mountPath"]) for mount in container["volumeMounts"])


def test_the_service_finds_the_pods(file, pod):
    service, deployment = of_kind(file, "Service"), of_kind(file, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["selector"]["matchLabels"] == service["spec"]["selector"]
    targets = {port["targetPort"] for port in service["spec"]["ports"]}
    assert targets == {port["name"] for port in pod["containers"][0]["ports"]}


def test_a_gpu_is_asked_for_where_it_is_used():
    for file in FILES:
        (container,) = of_kind(file, "Deployment")["spec"]["template"]["spec"]["containers"]
        wants = value_of(container["args"], "--device") == "cuda"
        assert wants == ("nvidia.com/gpu" in container["resources"]["limits"]) == ("gpu" in file.name)

"""HTTPS: who trusts the server gets in, whom a mutual one does not trust does not, and a gateway reaches its engine by TLS."""

import socket
import ssl

import pytest
import requests
import trustme
from front import ANSWER, MODEL, Front, user
from server_process import API_KEY

CHAT = {"model": MODEL, "messages": user(), "temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """Paths: an authority, what a server and a client have of it, and an authority that nobody knows."""
    folder = tmp_path_factory.mktemp("pki")
    authority, stranger = trustme.CA(), trustme.CA()
    paths = {}

    def write(name, blob):
        paths[name] = str(folder / f"{name}.pem")
        blob.write_to_path(paths[name])

    write("authority", authority.cert_pem)
    write("stranger", stranger.cert_pem)
    for name, issued in [
        ("server", authority.issue_cert("127.0.0.1", "localhost")),
        ("client", authority.issue_cert("client.example")),
        ("other client", stranger.issue_cert("client.example")),
    ]:
        chain = folder / f"{name}.pem"
        chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        paths[name] = str(chain)
        write(f"{name} key", issued.private_key_pem)
    return paths


def tls(pki):
    """Options of a server with its certificate."""
    return ("--tls-cert", pki["server"], "--tls-key", pki["server key"])


@pytest.fixture
def https(pki, start_process):
    """A server that speaks TLS on both of its ports; both are reached by name of their address."""
    return start_process("serve", "--grpc-port", "0", *tls(pki))


def chat(url, **options):
    """The text of a chat."""
    answer = requests.post(f"{url}/v1/chat/completions", json=CHAT, timeout=20, **options)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_who_trusts_the_authority_is_served(pki, https):
    assert https.url.startswith("https://")
    assert chat(https.url, verify=pki["authority"]) == ANSWER
    body = {**CHAT, "stream": True}
    with requests.post(f"{https.url}/predict", json=body, stream=True, verify=pki["authority"], timeout=20) as answer:
        assert b"".join(answer.iter_content(None)).decode() == ANSWER


def test_who_does_not_trust_it_goes_away(pki, https):
    with pytest.raises(requests.exceptions.SSLError):
        chat(https.url, verify=pki["stranger"])


def test_plain_text_is_not_served(https):
    with pytest.raises(requests.exceptions.RequestException):
        chat(https.url.replace("https", "http"))
    address = Front(https.url).address
    with socket.create_connection(address, timeout=20) as silent:
        # A handshake that does not come is not waited for for ever.
        assert silent.recv(1) == b""


def test_old_versions_are_refused(pki, https):
    context = ssl.create_default_context(cafile=pki["authority"])
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    address = Front(https.url).address
    with socket.create_connection(address) as plain, context.wrap_socket(plain, server_hostname="localhost") as wrapped:
        assert wrapped.version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(address) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain, server_hostname="localhost")


def test_mutual_tls(pki, start_process):
    server = start_process("serve", "--grpc-port", "0", *tls(pki), "--tls-client-ca", pki["authority"])
    known = (pki["client"], pki["client key"])
    assert chat(server.url, verify=pki["authority"], cert=known) == ANSWER
    for wrong in (None, (pki["other client"], pki["other client key"])):
        with pytest.raises(requests.exceptions.RequestException):
            chat(server.url, verify=pki["authority"], cert=wrong)


def test_a_gateway_reaches_its_engine_by_tls(pki, start_process, start_gateway):
    engine = start_process("serve", "--grpc-port", "0", *tls(pki), "--api-key", API_KEY)
    gateway = start_gateway(f"https://{engine.address}", "--engine-tls-ca", pki["authority"], "--engine-api-key", API_KEY)
    front = Front(gateway.url)
    gateway.wait_until(lambda: front.get("/ready").status_code == 200, "it has found its engine", 10)
    assert chat(gateway.url) == ANSWER
    doubtful = start_gateway(f"https://{engine.address}", "--engine-tls-ca", pki["stranger"])
    assert Front(doubtful.url).get("/ready").status_code == 503, "it does not trust what answers there"
    assert Front(doubtful.url).post("/v1/chat/completions", CHAT).status_code in (502, 503)

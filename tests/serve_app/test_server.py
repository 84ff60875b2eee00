"""A real server, as `zimage-turbo launch` starts it, and what must be true of it from outside."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from PIL import Image

from serve_app import haproxy
from serve_app.image_codec import read_parameters
from serve_app.settings import is_loopback
from tests.ports import free_ports
from tests.running_server import ROOT, RunningServer, running_server
from tests.serve_app.wrong_inputs import WRONG_INPUTS

pytestmark = pytest.mark.server

URL = "/v1/images/generations"
QUICK = {"num_inference_steps": 1, "guidance_scale": 1, "size": "32x32"}
#: Far more than any test has patience for: what is sent with it must be stopped.
ENDLESS = {"num_inference_steps": 100, "guidance_scale": 2, "n": 10}


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=300) as client:
        yield client


def openai_client(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=300)


def draw(client: httpx.Client, **fields: object) -> httpx.Response:
    return client.post(URL, json={"prompt": "a red circle"} | QUICK | fields)


def metric(client: httpx.Client, name: str) -> float:
    """The sum of a metric's samples, whatever their labels but for those in `name`."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_openais_client_gets_a_picture_in_each_format(server: str, output_format: str) -> None:
    with openai_client(server) as client:
        answer = client.images.generate(
            prompt="a red circle on a white background",
            output_format=output_format,  # type: ignore[arg-type]
            quality="low",
            extra_body={"seed": 3, "num_inference_steps": 2},
        )
    assert answer.data is not None
    file = base64.b64decode(answer.data[0].b64_json or "")
    image = Image.open(io.BytesIO(file))
    assert (image.format, image.size) == (output_format.upper(), (256, 256))
    parameters = read_parameters(file)
    assert parameters is not None and "Seed: 3" in parameters
    assert answer.output_format == output_format


def test_wrong_input_is_refused_and_the_server_goes_on(client: httpx.Client) -> None:
    assert len(WRONG_INPUTS) >= 40
    wrong = []
    for row in WRONG_INPUTS:
        response = client.post(URL, content=row.body, headers=row.headers)
        error = response.json()["error"]
        if (response.status_code, error["param"]) != (row.status, row.param) or (
            row.phrase not in error["message"]
        ):
            wrong.append((row.name, response.status_code, error))
    assert wrong == []
    assert client.get("/readyz").status_code == 200
    assert draw(client).status_code == 200


def test_a_large_body_passes_the_proxy_whole(client: httpx.Client) -> None:
    """Within the limit but beyond any buffer of a proxy; what arrives is counted by its refusal."""
    response = client.post(URL, json={"prompt": "字" * 300_000})
    assert "300,000" in response.json()["error"]["message"]


def test_a_caller_that_hangs_up_stops_the_drawing(client: httpx.Client, server: str) -> None:
    cancelled = metric(client, 'zimage_requests_total{outcome="cancelled"')
    with httpx.Client(base_url=server) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post(URL, json={"prompt": "a red circle"} | ENDLESS, timeout=3)
    until(lambda: metric(client, 'zimage_requests_total{outcome="cancelled"') == cancelled + 1)
    until(lambda: metric(client, "zimage_worker_busy") == 0)
    assert draw(client).status_code == 200


def test_health_is_answered_while_a_picture_is_drawn(client: httpx.Client, server: str) -> None:
    with httpx.Client(base_url=server, timeout=300) as other:
        sent = threading.Thread(target=lambda: draw(other, num_inference_steps=30, size="256x256"))
        sent.start()
        until(lambda: metric(client, "zimage_worker_busy") == 1)
        assert client.get("/readyz").status_code == client.get("/healthz").status_code == 200
        sent.join()


def test_a_client_cannot_choose_when_serve_gives_up(client: httpx.Client) -> None:
    response = client.post(
        URL, json={"prompt": "a red circle"} | QUICK, headers={"x-request-timeout-seconds": "0.001"}
    )
    assert response.status_code == 200


def test_the_page_the_docs_and_the_metrics_are_there(client: httpx.Client) -> None:
    assert "text/html" in client.get("/").headers["content-type"]
    assert client.get("/docs").status_code == 200
    assert metric(client, "zimage_worker_up{") == 1


def test_what_people_reach_listens_on_the_loopback_only(launched: RunningServer) -> None:
    """Ray's own ports listen everywhere and ask for the cluster's token; HTTP is ours to keep in."""
    addresses = {
        (connection.laddr.ip, connection.laddr.port)
        for process in launched.processes()
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    answering = {
        (ip, port) for ip, port in addresses if not is_loopback(ip) and _speaks_http_to_strangers(port)
    }
    assert answering == set()


def _speaks_http_to_strangers(port: int) -> bool:
    """Whether a plain request is answered with something of ours or of HAProxy's."""
    try:
        for path in ("/healthz", "/stats", "/metrics"):
            text = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=2).text
            if "zimage" in text or "haproxy" in text.lower() or '"status":"ok"' in text:
                return True
    except httpx.HTTPError:
        return False
    return False


def test_the_terminal_shows_the_address_and_no_noise(launched: RunningServer) -> None:
    assert launched.output[0].startswith("zimage-turbo is ready: http://127.0.0.1:"), launched.output
    traces = [line for line in launched.output if "Traceback" in line]
    assert traces == []


@pytest.mark.skipif(haproxy.binary() is None, reason="no HAProxy for this platform")
def test_haproxy_is_in_front_by_default(launched: RunningServer) -> None:
    assert "haproxy" in {process.name() for process in launched.processes()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that tests may harm: Serve's own proxy, a tiny model, and room for one to wait."""
    from tests.zimage_engine.tiny_models import write_tiny_z_image

    model = write_tiny_z_image(tmp_path_factory.mktemp("models") / "tiny-z-image")
    environment = {"ZIMAGE_HAPROXY": "false", "ZIMAGE_CPU_THREADS": "1", "ZIMAGE_MAX_QUEUED_REQUESTS": "1"}
    with running_server("--model", str(model), "--no-ui", environment=environment) as running:
        yield running


#: Seconds of work for the tiny model.
LONG = {"num_inference_steps": 100, "n": 10, "size": "128x128", "guidance_scale": 2, "seed": 9}


def test_serves_own_proxy_passes_hang_ups_on_too(small: RunningServer) -> None:
    with httpx.Client(base_url=small.base_url, timeout=300) as client:
        with httpx.Client(base_url=small.base_url, timeout=1) as impatient, pytest.raises(httpx.ReadTimeout):
            draw(impatient, **LONG)
        until(lambda: metric(client, 'zimage_requests_total{outcome="cancelled"') == 1)
        until(lambda: metric(client, "zimage_worker_busy") == 0)


def test_where_too_many_wait_the_others_are_told_to_come_back(small: RunningServer) -> None:
    with httpx.Client(base_url=small.base_url, timeout=300) as client:
        with ThreadPoolExecutor(12) as senders:
            answers = list(senders.map(lambda _: draw(client, **LONG | {"n": 2}), range(12)))
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) > 0
        assert draw(client).status_code == 200


def test_a_killed_worker_costs_no_picture(small: RunningServer) -> None:
    answers: list[httpx.Response] = []
    with (
        httpx.Client(base_url=small.base_url, timeout=300) as client,
        httpx.Client(base_url=small.base_url, timeout=60) as observer,
    ):
        sent = threading.Thread(target=lambda: answers.append(draw(client, **LONG)))
        sent.start()
        until(lambda: metric(observer, "zimage_worker_busy") == 1)
        (worker,) = [process for process in small.processes() if "ImageWorker" in "".join(process.cmdline())]
        worker.kill()
        sent.join()
        assert answers[0].status_code == 200, answers[0].text
        assert [picture["seed"] for picture in answers[0].json()["data"]] == list(range(9, 19))
        assert metric(observer, "zimage_worker_retries_total") == 1


# The last of those that use `small`.
def test_the_end_leaves_no_process(small: RunningServer) -> None:
    processes = small.processes()
    assert len(processes) > 3
    assert small.stop() == 0
    assert [process for process in processes if _is_alive(process)] == []
    assert small.output[-1] == "zimage-turbo has stopped\n"


def test_with_a_key_other_machines_may_come_and_need_it() -> None:
    environment = {"ZIMAGE_API_KEY": "swordfish"}
    with running_server("--host", "0.0.0.0", environment=environment) as running:
        url = running.base_url
        assert httpx.get(f"{url}/readyz").status_code == 200
        for path in ("/", "/docs", "/metrics", "/v1/models", "/config"):
            assert httpx.get(url + path).status_code == 401, path
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer swordfish"}).status_code == 200
        assert "text/html" in httpx.get(url, auth=("me", "swordfish")).headers["content-type"]
        assert "login" not in httpx.get(f"{url}/config", auth=("me", "swordfish")).text[:200]


def test_a_model_that_cannot_be_loaded_ends_the_launch_with_the_reason() -> None:
    launched = subprocess.run(
        [
            sys.executable,
            "-m",
            "serve_app.cli",
            "launch",
            "--model",
            "nobody/nothing",
            "--port",
            str(free_ports(1)[0]),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert launched.returncode != 0
    assert launched.stderr.startswith("zimage-turbo: 'nobody/nothing' is not"), launched.stderr
    assert len(launched.stderr.splitlines()) == 1


def test_ctrl_c_ends_everything_also_while_the_server_starts() -> None:
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app.cli", "launch", "--port", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    launcher = psutil.Process(process.pid)
    until(lambda: len(launcher.children(recursive=True)) > 3)
    started = launcher.children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output
    assert [child for child in started if _is_alive(child)] == []


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (["--model", "/nowhere/model"], r"nothing at '/nowhere/model'"),
        (["--model", str(ROOT / "tests")], r"no model of a supported family"),
        (["--host", "0.0.0.0"], r"ZIMAGE_API_KEY"),
        (["--port", "0"], r"port"),
    ],
)
def test_what_cannot_be_started_is_told_in_a_sentence(options: list[str], phrase: str) -> None:
    told = refused_launch(*options)
    assert re.search(phrase, told), told


def test_a_taken_port_is_told_before_anything_starts() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        told = refused_launch("--port", str(port))
    assert f"port {port}" in told and "--port" in told


def refused_launch(*options: str) -> str:
    """What `launch` says on its standard error where it does not start."""
    launched = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "launch", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert launched.returncode != 0
    assert "Traceback" not in launched.stderr
    return launched.stderr

"""Builds the CPU image without Docker, starts it as an orchestrator would, and draws a picture with it.

`make image-test` runs it, as root on Debian with buildah and debootstrap; only the standard library is
needed. The image runs as its own user on a read-only root, without capabilities, in its own process
and mount namespaces, with the command and the environment that the image declares.
"""

from __future__ import annotations

import argparse
import base64
import configparser
import importlib.metadata
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BASE = "localhost/zimage-turbo-base:bookworm"
IMAGE = "localhost/zimage-turbo:image-test"
MIRROR = "http://deb.debian.org/debian"
READY_SECONDS = 300.0
STOP_SECONDS = 60.0
#: A CPU image of this size says that CUDA, tests or caches came in.
LARGEST_BYTES = 3 * 10**9
UNWANTED_COMMANDS = (
    "gcc",
    "cc",
    "g++",
    "make",
    "ld",
    "as",
    "pip",
    "pip3",
    "uv",
    "cargo",
    "rustc",
    "go",
    "git",
)
#: How files of weights end, whatever made them.
WEIGHTS = ("safetensors", "ckpt", "gguf", "onnx", "pth.tar")
#: No file of the program itself or of a package's Python side is larger, but weights are.
LARGEST_DATA_BYTES = 50 * 10**6
#: What the build is told for the labels.
REVISION, SOURCE_URL = "0" * 40, "https://example.org/zimage-turbo"


class ImageTestFailed(Exception):
    """The image is not as it should be; the message says what was expected and what was found."""


@dataclass(frozen=True)
class PipAtHome:
    """How pip is configured on this machine, so that pip in the build finds the same packages."""

    config: str
    certificates: Path | None
    local_folders: tuple[Path, ...]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "build" / "image-test",
        help="where images and the base are kept",
    )
    arguments.add_argument("--base", default=BASE, help="base image; the default one is made by debootstrap")
    arguments.add_argument("--keep", action="store_true", help="keep the images for the next run")
    chosen = arguments.parse_args()
    try:
        check_machine(chosen.base)
        chosen.folder.mkdir(parents=True, exist_ok=True)
        run_image_test(Buildah(chosen.folder.resolve()), chosen.base)
    except ImageTestFailed as failed:
        say(f"image-test: {failed}")
        raise SystemExit(1) from None
    finally:
        if not chosen.keep:
            shutil.rmtree(chosen.folder, ignore_errors=True)


def run_image_test(buildah: Buildah, base: str) -> None:
    with told("base image"):
        if base == BASE and not buildah.has(BASE):
            make_base(buildah)
    with told("build"):
        build(buildah, base)
    container = buildah("from", "--pull-never", IMAGE)
    root = Path(buildah("mount", container))
    try:
        config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        check_files(root)
        check_parts_list(root)
        check_config(config, base)
        with told("start, picture, stop"):
            check_running(root, config)
        tell_size(root)
    finally:
        buildah("umount", container)
        buildah("rm", container)
    say("image-test: passed")


class Buildah:
    """buildah without privileges of a daemon: images as plain folders, builds in a chroot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._command = [
            *("buildah", "--storage-driver", "vfs"),
            *("--root", str(folder / "storage"), "--runroot", str(folder / "run")),
        ]

    def __call__(self, *arguments: str) -> str:
        """The command's output; what it says beside it goes to the terminal."""
        done = subprocess.run([*self._command, *arguments], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ImageTestFailed(
                f"buildah {arguments[0]} ended with code {done.returncode}: {done.stdout[-2000:]}"
            )
        return done.stdout.strip()

    def has(self, image: str) -> bool:
        return (
            subprocess.run([*self._command, "inspect", image], capture_output=True, check=False).returncode
            == 0
        )


def check_machine(base: str) -> None:
    if os.geteuid() != 0:
        raise ImageTestFailed("building in a chroot needs root; run it with sudo")
    needed = ("buildah", "unshare", "setpriv", "nsenter", *(("debootstrap",) if base == BASE else ()))
    if missing := [command for command in needed if shutil.which(command) is None]:
        raise ImageTestFailed(
            f"not installed: {', '.join(missing)}; apt-get install buildah debootstrap util-linux"
        )


def make_base(buildah: Buildah) -> None:
    """The smallest Debian there is, as an image."""
    folder = buildah.folder / "base"
    shutil.rmtree(folder, ignore_errors=True)
    run("debootstrap", "--variant=minbase", "bookworm", str(folder), MIRROR)
    for leftover in ("var/cache/apt", "var/lib/apt/lists", "var/log"):
        shutil.rmtree(folder / leftover)
        (folder / leftover).mkdir()
    container = buildah("from", "scratch")
    buildah("add", container, str(folder), "/")
    buildah("config", "--cmd", "bash", container)
    buildah("commit", "--rm", container, BASE)
    shutil.rmtree(folder)


def build(buildah: Buildah, base: str) -> None:
    pip = pip_at_home()
    config = buildah.folder / "pip.conf"
    config.write_text(pip.config, encoding="utf-8")
    certificates = ("--secret", f"id=ca_certificates,src={pip.certificates}") if pip.certificates else ()
    folders = [option for folder in pip.local_folders for option in ("--volume", f"{folder}:{folder}:ro")]
    buildah(
        *("bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--quiet"),
        *("--file", str(ROOT / "docker" / "Dockerfile")),
        *("--ignorefile", str(ROOT / "docker" / "Dockerfile.dockerignore")),
        *(
            "--build-arg",
            f"BASE_IMAGE={base}",
            "--build-arg",
            "VARIANT=cpu",
            "--build-arg",
            "TORCH_CPU_INDEX=",
        ),
        *("--build-arg", f"VERSION={project_version()}", "--build-arg", f"REVISION={REVISION}"),
        *("--build-arg", f"SOURCE_URL={SOURCE_URL}"),
        *("--secret", f"id=pip_conf,src={config}", *certificates, *folders),
        *("--tag", IMAGE, str(ROOT)),
    )


def pip_at_home() -> PipAtHome:
    """What `pip config` says here, as a file for elsewhere, with the local folders that it names."""
    listed = run(sys.executable, "-m", "pip", "config", "list")
    values: dict[str, str] = {}
    for line in listed.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            values[name.rsplit(".", 1)[-1]] = value.strip("'\"")
    certificates = Path(values.pop("cert")).resolve() if "cert" in values else None
    local = [
        Path(place.removeprefix("file://"))
        for name in ("find-links", "extra-index-url", "index-url")
        for place in values.get(name, "").split()
        if place.startswith(("/", "file://"))
    ]
    # An index page may point to files beside its own folder.
    folders = {folder.parent if folder.name == "simple" else folder for folder in local}
    if certificates is not None:
        values["cert"] = "/run/secrets/ca_certificates"
    config = configparser.RawConfigParser()
    config["global"] = values
    lines = "\n".join(f"{name} = {value}" for name, value in values.items())
    existing = tuple(sorted(folder for folder in folders if folder.is_dir()))
    return PipAtHome(f"[global]\n{lines}\n", certificates, existing)


def check_files(root: Path) -> None:
    """No build tools, no package lists, and no weights but the demo model's."""
    places = [
        root / folder for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin", "opt/zimage-turbo/bin")
    ]
    tools = [command for command in UNWANTED_COMMANDS if any((place / command).exists() for place in places)]
    tools += [str(found.relative_to(root)) for found in root.glob("opt/venv/lib/python3.*/site-packages/pip")]
    tools += [str(found.relative_to(root)) for found in root.glob("usr/lib/python3*/*-packages/pip")]
    if tools:
        raise ImageTestFailed(f"build tools must stay in the build stages, found {', '.join(tools)}")
    left = [str(file) for file in root.glob("var/lib/apt/lists/*_Packages*")]
    if left:
        raise ImageTestFailed(f"apt's lists belong in no image, found {', '.join(left)}")
    demo = root / "opt/zimage-turbo/zimage_engine/demo/model"
    weights = [file for kind in WEIGHTS for file in root.glob(f"opt/**/*.{kind}")]
    strange = [file for file in weights if demo not in file.parents]
    if strange or not weights:
        raise ImageTestFailed(f"only the demo model's weights belong inside, found {strange or 'none'}")
    large = [
        file
        for file in root.glob("opt/**/*")
        if file.is_file() and not file.is_symlink() and file.stat().st_size > LARGEST_DATA_BYTES
    ]
    strange = [file for file in large if ".so" not in file.suffixes]
    if strange:
        raise ImageTestFailed(f"only libraries are that large, found {', '.join(map(str, strange))}")
    if any((root / "var/cache/zimage-turbo").iterdir()):
        raise ImageTestFailed("the cache volume must be empty in the image")
    say(f"  {len(weights)} weight files, all the demo model's; no build tools")


def check_parts_list(root: Path) -> None:
    """The SBOM names every Python package that is installed, in its version, and no other."""
    found = json.loads((root / "usr/share/sbom/zimage-turbo.cdx.json").read_text(encoding="utf-8"))
    if found.get("bomFormat") != "CycloneDX":
        raise ImageTestFailed(f"the list of parts must be CycloneDX, got {found.get('bomFormat')}")
    places = [*root.glob("opt/venv/lib/python3.*/site-packages"), root / "opt/zimage-turbo"]
    installed = {
        normal_name(each.metadata["Name"]): each.version
        for each in importlib.metadata.distributions(path=[str(place) for place in places])
    }
    listed = {
        normal_name(part["name"]): part["version"]
        for part in (*found["components"], found["metadata"]["component"])
    }
    if listed != installed or "torch" not in installed:
        different = sorted(set(listed.items()) ^ set(installed.items()))
        raise ImageTestFailed(f"the list of parts is not what is installed: {different}")
    say(f"  {len(listed)} Python packages, each in the list of parts")


def normal_name(package: str) -> str:
    """One spelling for a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def check_config(config: dict[str, Any], base: str) -> None:
    """What the image declares: labels, an init, a health check, a user that is a number and not root."""
    labels = {
        name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()
    }
    expected = {
        "title": "zimage-turbo",
        "licenses": "Apache-2.0",
        "version": f"{project_version()}-cpu",
        "revision": REVISION,
        "source": SOURCE_URL,
        "base.name": base,
    }
    wrong = {name: labels.get(name) for name, value in expected.items() if labels.get(name) != value}
    if wrong or not labels.get("description"):
        raise ImageTestFailed(f"labels must be {expected} and a description, got {labels}")
    user, _, group = config["User"].partition(":")
    if not (user.isdigit() and group.isdigit() and int(user) and int(group)):
        raise ImageTestFailed(f"the user must be two numbers and not root's, got {config['User']}")
    if config["Entrypoint"] != ["tini", "--"]:
        raise ImageTestFailed(f"the first process must be tini, got {config['Entrypoint']}")
    if (
        set(config["Volumes"]) != {"/var/cache/zimage-turbo", "/var/lib/zimage-turbo", "/tmp"}
        or "8000/tcp" not in config["ExposedPorts"]
    ):
        raise ImageTestFailed(
            f"three volumes and port 8000, got {config['Volumes']} {config['ExposedPorts']}"
        )
    if config.get("Healthcheck", {}).get("Test", [""])[0] != "CMD":
        raise ImageTestFailed(f"a health check that needs no shell, got {config.get('Healthcheck')}")
    secret = [line.partition("=")[0] for line in config["Env"] if re.search("KEY|TOKEN|PASSWORD", line)]
    if secret:
        raise ImageTestFailed(f"no secret belongs into an image's environment, found {', '.join(secret)}")


def project_version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return version


def check_running(root: Path, config: dict[str, Any]) -> None:
    """Start, be healthy, refuse without a key, draw with it, stop on SIGTERM."""
    key = secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(line.split("=", 1) for line in config["Env"])
    environment |= {"ZIMAGE_API_KEY": key, "ZIMAGE_PORT": str(port)}
    log = root.parent / "image-test.log"
    began = time.monotonic()
    with log.open("wb") as output, started(root, config, environment, output) as (process, init):
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process)
            say(f"  ready after {time.monotonic() - began:.0f} s")
            check_confined(init, config["User"])
            inside(init, config, environment, config["Healthcheck"]["Test"])
            check_drawing(f"http://127.0.0.1:{port}", key)
            asked = time.monotonic()
            os.kill(init, signal.SIGTERM)
            code = process.wait(STOP_SECONDS)
        except (ImageTestFailed, OSError, subprocess.TimeoutExpired) as failed:
            output.flush()
            raise ImageTestFailed(f"{failed}\n{log.read_text(encoding='utf-8')[-4000:]}") from failed
    said = log.read_text(encoding="utf-8")
    log.unlink()
    if code != 0 or "zimage-turbo has stopped" not in said:
        raise ImageTestFailed(f"SIGTERM must end it with code 0, got {code}:\n{said[-4000:]}")
    say(f"  stopped {time.monotonic() - asked:.1f} s after SIGTERM, with code 0")


#: What a container engine does, in a mount namespace of its own. "$0" is the image's root.
ENGINE = r"""
set -e
mount --make-rprivate /
mount --bind "$0" "$0"
mount -t proc proc "$0/proc"
mount -t sysfs -o ro sysfs "$0/sys"
mount -t tmpfs -o mode=755 tmpfs "$0/dev"
for device in null zero full random urandom; do
  touch "$0/dev/$device"; mount --bind "/dev/$device" "$0/dev/$device"
done
ln -s /proc/self/fd "$0/dev/fd"
mkdir "$0/dev/shm"
mount -t tmpfs -o mode=1777,size=1g tmpfs "$0/dev/shm"
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs "$0/tmp"
mount -t tmpfs -o noexec,nosuid,nodev,mode=700,uid="$OWNER",gid="$GROUP" tmpfs "$0/var/cache/zimage-turbo"
mount -t tmpfs -o noexec,nosuid,nodev,mode=700,uid="$OWNER",gid="$GROUP" tmpfs "$0/var/lib/zimage-turbo"
mount -o remount,bind,ro "$0"
exec chroot "$0" setpriv --no-new-privs --bounding-set=-all --reuid="$OWNER" --regid="$GROUP" --clear-groups \
    env -i "$@"
"""


@contextmanager
def started(
    root: Path, config: dict[str, Any], environment: dict[str, str], output: Any
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The image's own command; yields the process to wait for, and the number of the first one inside."""
    # Every engine lays a file of its own over this one.
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost image-test\n", encoding="ascii")
    owner, _, group = config["User"].partition(":")
    variables = [f"{name}={value}" for name, value in environment.items()]
    command = [f"--chdir={config['WorkingDir']}", *variables, *config["Entrypoint"], *config["Cmd"]]
    process = subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENGINE, str(root), *command],
        env={**os.environ, "OWNER": owner, "GROUP": group},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        time.sleep(1)
        if process.poll() is not None:
            raise ImageTestFailed("the image's command did not start")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
        yield process, int(children.split()[0])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until_ready(base_url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ImageTestFailed(f"the image's command ended with code {process.returncode}")
        try:
            with urllib.request.urlopen(f"{base_url}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise ImageTestFailed(f"not ready after {READY_SECONDS:g} s")


def check_confined(init: int, user: str) -> None:
    """The first process is tini, without capabilities; its root takes no files, not even from root."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{init}/status").read_text(encoding="ascii").splitlines()
    )
    if status["Name"] != "tini":
        raise ImageTestFailed(
            f"the first process must be tini, which passes signals on, got {status['Name']}"
        )
    if status["Uid"].split()[0] != user.partition(":")[0] or status["Uid"].split()[0] == "0":
        raise ImageTestFailed(f"it must run as user {user}, got {status['Uid']}")
    if int(status["CapEff"], 16) or int(status["CapBnd"], 16) or status["NoNewPrivs"] != "1":
        raise ImageTestFailed(f"it must run without capabilities, got {status['CapEff']} {status['CapBnd']}")
    try:
        Path(f"/proc/{init}/root/opt/probe").write_bytes(b"")
    except OSError as refused:
        say(f"  process {init} runs as user {status['Uid'].split()[0]}; its root is a {refused.strerror}")
        return
    raise ImageTestFailed("the root file system must be read-only, and a file could be written")


def inside(init: int, config: dict[str, Any], environment: dict[str, str], test: list[str]) -> None:
    """The image's health check, among its own processes and as its own user."""
    owner, _, group = config["User"].partition(":")
    variables = [f"{name}={value}" for name, value in environment.items()]
    enter = [
        "nsenter",
        f"--target={init}",
        "--mount",
        "--pid",
        "--root",
        f"--setuid={owner}",
        f"--setgid={group}",
    ]
    run(*enter, "env", "-i", *variables, *test[1:])


def check_drawing(base_url: str, key: str) -> None:
    body = json.dumps({"prompt": "a red circle on a white background", "seed": 7}).encode()
    address = f"{base_url}/v1/images/generations"
    headers = {"Content-Type": "application/json"}
    try:
        urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=30)
    except urllib.error.HTTPError as refused:
        if refused.code != 401:
            raise ImageTestFailed(f"a request without the key must get 401, got {refused.code}") from None
    else:
        raise ImageTestFailed("a request without the key must get 401, got a picture")
    began = time.monotonic()
    request = urllib.request.Request(address, body, {**headers, "Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        picture = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    if not picture.startswith(b"\x89PNG"):
        raise ImageTestFailed(f"expected a PNG picture, got {picture[:16]!r}")
    say(f"  drew a picture of {len(picture):,} bytes in {time.monotonic() - began:.1f} s")


def tell_size(root: Path) -> None:
    """What the image takes on a disk, with its largest parts."""
    parts = {}
    for folder in ("opt/venv", "opt/zimage-turbo", "usr", "var"):
        parts[folder] = int(run("du", "-sxB1", str(root / folder)).split()[0])
    whole = int(run("du", "-sxB1", str(root)).split()[0])
    say(f"  size: {whole / 1e6:,.0f} MB, of it " + ", ".join(f"{n} {s / 1e6:,.0f}" for n, s in parts.items()))
    if whole > LARGEST_BYTES:
        raise ImageTestFailed(f"a CPU image of more than {LARGEST_BYTES / 1e9:g} GB holds what it should not")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageTestFailed(
            f"{command[0]} ended with code {done.returncode}: {(done.stderr or done.stdout)[-2000:]}"
        )
    return done.stdout


@contextmanager
def told(step: str) -> Iterator[None]:
    say(f"{step} ...")
    began = time.monotonic()
    yield
    say(f"{step}: {time.monotonic() - began:.0f} s")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

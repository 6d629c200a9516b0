"""benchmarks.fleet, against real SSH servers on this machine: one process for each "board"."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import fleet
from benchmarks.accuracy import main as measure_accuracy
from benchmarks.boards import ssh
from benchmarks.boards.list import boards_from_file
from benchmarks.measuring.result import STAGES, STATISTICS, read_result, write_result
from benchmarks.report import main as make_report
from benchmarks.reporting.wording import UNKNOWN
from deploy.board.archive import pack, unpack
from deploy.board.commands import BUNDLE_VERSION
from deploy.board.run import MANIFEST
from deploy.board.signature import SIGNATURE, sign
from deploy.bundle import main as make_bundle
from deploy.contract import RESULT_VERSION, provenance, sealed, sidecar_path, write_sidecar
from deploy.files import sha256_of
from tests.stand_ins.detector import CONTRACT, write_detector
from tests.stand_ins.tensorrt import write_module

EXAMPLE = Path(__file__).parents[2] / "docs" / "boards.example.toml"
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
ENGINE = b"an engine"
RUN = """
import os, pathlib, shutil, signal, sys, time
here, fault = pathlib.Path(__file__).resolve().parent, os.environ.get("FAULT", "")
command, words = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2])) if sys.argv[1] != "build" else {}
with open(here / "calls.txt", "a") as calls:
    calls.write(command + " ")
print("this is", command, os.environ.get("WORD", ""))
if fault == command:
    print("error: no \\x1b[31mmemory for " + command, file=sys.stderr)
    sys.exit(2)
if fault == "hang" and command == "build":
    signal.signal(signal.SIGTERM, lambda *_: ((here / "ended").touch(), print("asked to end"), sys.exit(1)))
    (here / "started").touch()
    time.sleep(60)
if fault == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fault in ("stop", "cut") and command == "build":  # the server of this connection, which ran timeout, which ran this
    with open(f"/proc/{os.getppid()}/stat") as stat:
        server = int(stat.read().split()[3])
    (here / "server.pid").write_text(str(server))
    os.kill(server, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    time.sleep(3)
    sys.exit(1)
if command == "build":
    engine = here / sys.argv[sys.argv.index("-o") + 1]
    shutil.copy(here / "template.engine", engine)
    shutil.copy(here / "template.engine.json", str(engine) + ".json")
if command == "bench":
    shutil.copy(here / "template.result.json", here / words["-o"])
    if fault == "result":
        (here / words["-o"]).write_text(os.environ["RESULT"])
    if fault == "large":
        os.truncate(here / words["-o"], 1 << 26)
"""
"""Does what a bundle's runner does, or what FAULT says."""

HERE = SSHD and shutil.which("ssh-keygen") and importlib.util.find_spec("asyncssh")
needs_server = pytest.mark.skipif(
    not HERE, reason="needs sshd (apt-get install openssh-server) and asyncssh (pip install 'crosskd[fleet]')"
)


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """Folder with key pairs: `host` and `other_host` for servers, `user` and `stranger` for clients."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("host", "other_host", "user", "stranger"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(folder / "encrypted")], check=True)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No key, agent, config or known host of whoever runs the tests."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path, keys):
    """`server(host_key="host")` -> port of a new SSH server, which takes the key `user`."""
    started = []
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root wants this empty folder, as its service makes it

    def start(host_key="host"):
        port = free_port()
        config = tmp_path / f"sshd.{port}"
        config.write_text(
            f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {keys / host_key}\nPidFile none\nStrictModes no\n"
            f"AuthorizedKeysFile {keys / 'user.pub'}\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "UsePAM no\nSubsystem sftp internal-sftp\n"
        )
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=(tmp_path / f"sshd.{port}.log").open("wb"))
        started.append(process)
        for _ in range(100):
            assert process.poll() is None, (tmp_path / f"sshd.{port}.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return port
            except ConnectionRefusedError:
                time.sleep(0.05)
        raise AssertionError("sshd does not listen")

    yield start
    for process in started:
        process.terminate()
        process.wait()


def wait_for(happened):
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def boards_file(tmp_path, keys):
    """`boards_file(a={"port": ...}, ...)` -> boards.toml; key and known hosts are good unless they are given."""

    def write(**boards):
        lines = []
        for name, given in boards.items():
            known_hosts = tmp_path / f"known_hosts.{name}"
            known_hosts.write_text(f"[127.0.0.1]:{given['port']} {(keys / 'host.pub').read_text()}")
            values = {
                "name": name,
                "host": "127.0.0.1",
                "folder": str(tmp_path / "on the boards" / name),
                "key": str(keys / "user"),
                "known_hosts": str(known_hosts),
                "python": sys.executable,
                **given,
            }
            lines.append("[[board]]")
            for key, value in values.items():
                text = json.dumps(value)
                if isinstance(value, dict):
                    text = "{" + ", ".join(f"{name} = {json.dumps(word)}" for name, word in value.items()) + "}"
                lines.append(f"{key} = {text}")
        path = tmp_path / "boards.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def bundle(tmp_path):
    """`bundle(extra=b"")` -> archive of a bundle whose runner is RUN."""

    def make(extra=b""):
        result = tmp_path / "template.result.json"
        write_result(result, latency_result(), {})
        engine = tmp_path / "template.engine"
        engine.write_bytes(ENGINE)
        write_sidecar(engine, {}, None, {"device": "Orin\n\x1b[2J", "tensorrt": "10.3.0"})
        files = {
            "run.py": RUN.encode(),
            "template.engine": ENGINE,
            "template.engine.json": sidecar_path(engine).read_bytes(),
            "template.result.json": result.read_bytes(),
            "golden/0.input.npy": b"x" * 500_000 + extra,
            "graphs/int8.onnx": b"y" * 500_000,
        }
        described = {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            for name, content in files.items()
        }
        manifest = manifest_of(("int8", "float"), described)
        pack("mini", {**files, MANIFEST: json.dumps(manifest).encode()}, tmp_path / "mini.tar.gz")
        return tmp_path / "mini.tar.gz"

    return make


def manifest_of(kinds, files):
    sources = {kind: {"file": f"{kind}.onnx", "parameters": 1, "amax": {}, "graphs": {}} for kind in kinds}
    return {
        "bundle_version": BUNDLE_VERSION,
        "contract": CONTRACT.to_json(),
        "golden": 1,
        "sources": sources,
        "versions": {},
        "files": files,
    }


def latency_result():
    """A result as a board's bench writes it."""
    summary = dict.fromkeys(STATISTICS, 4.0)
    return {
        "kind": "latency",
        "role": "engine-int8",
        "model": {
            "file": "mini.int8.engine", "format": "engine", "sha256": hashlib.sha256(ENGINE).hexdigest(),
            "bytes": len(ENGINE), "parameters": 1, "inputs": {}, "command": [],
        },
        "data": {
            "annotations": "golden", "annotations_sha256": "0", "images_dir": "golden", "images": 2, "class_names": [],
        },
        "environment": {"cpu": None, "cores": 6, "os": "Linux"},
        "numbers": {
            "summary_ms": {**dict.fromkeys(STAGES), "total": {**summary, "median": 3.25, "p99": 12.5}},
            "samples_ms": {**dict.fromkeys(STAGES), "total": [4.0] * 200},
            "stable": True, "spread": 0.01, "comparable": False, "comparable_reasons": [], "threads": None,
            "description": "TensorRT 10.3.0, Orin", "warmup_runs": 5, "mode": "back-to-back", "fps": None,
            "late_frames": None, "memory_mib": {"host_peak": None, "device_peak": None}, "power": None,
            "power_reason": None, "sweep": None,
        },
    }  # fmt: skip


def outcomes(folder):
    """(board, precision) -> outcome, of fleet.json."""
    document = json.loads((folder / "fleet.json").read_text())
    return {(one["board"], one["precision"]): one for one in document["outcomes"]}


def run_fleet(boards, archive, output, *words):
    return fleet.main([str(boards), str(archive), "-o", str(output), *words])


@needs_server
def test_one_board_that_fails_does_not_hold_up_the_others(server, boards_file, bundle, tmp_path, capsys):
    """And what each has done already is not done again, but for a bundle that changed."""
    port, other = server(), server()
    both = {"precisions": ["int8", "fp16"], "environment": {"WORD": "it's $HOME; `id`"}}
    good, bad = {"port": port, **both}, {"port": other, "environment": {"FAULT": "build"}}
    boards, archive = boards_file(good=good, bad=bad), bundle()
    assert run_fleet(boards, archive, tmp_path / "out") == 2
    shown = capsys.readouterr()
    found = outcomes(tmp_path / "out")
    assert {key: one["state"] for key, one in found.items()} == {
        ("good", "int8"): "ok", ("good", "fp16"): "ok", ("bad", "int8"): "failed",
    }  # fmt: skip
    assert found["bad", "int8"]["reason"] == "build: no  [31mmemory for build"
    assert found["good", "int8"]["steps"] == dict.fromkeys(("upload", "build", "check", "bench"), "done")
    assert (found["good", "int8"]["median_ms"], found["good", "int8"]["p99_ms"]) == (3.25, 12.5)
    result = tmp_path / "out" / found["good", "fp16"]["results"][0]
    assert read_result(result)["numbers"]["summary_ms"]["total"]["median"] == 3.25
    assert (tmp_path / "out/good/build.int8.log").read_text() == "this is build it's $HOME; `id`\n"
    assert "memory for build" in (tmp_path / "out/bad/build.int8.log").read_text()
    assert "error: 1 of 2 boards failed: bad; what is above says why" in shown.err
    lines = shown.out.splitlines()
    assert [line.split()[:6] for line in lines[1:3]] == [
        ["good", "Orin", "[2J", "TensorRT", "10.3.0", precision] for precision in ("int8", "fp16")
    ]
    assert lines[3].split()[:2] == ["bad", UNKNOWN]
    assert "good: build int8: " in shown.err
    assert "bad: build int8: failed after" in shown.err

    calls = next((tmp_path / "on the boards" / "good").glob("mini-*/calls.txt"))
    assert calls.read_text().split() == ["build", "check", "bench"] * 2
    engine = calls.parent / "mini.fp16.engine.json"
    engine.write_text(engine.read_text().replace(hashlib.sha256(ENGINE).hexdigest(), "0" * 64))
    calls.write_text("")
    boards = boards_file(good=good, bad={"port": other})
    assert run_fleet(boards, archive, tmp_path / "out", "--jobs", "1") == 2  # what is measured is of another engine
    found = outcomes(tmp_path / "out")
    assert found["good", "int8"]["steps"] == {
        "upload": "done before", "check": "done", "build": "done before", "bench": "done before",
    }  # fmt: skip
    assert calls.read_text().split() == ["check", "check", "bench"]
    assert found["good", "fp16"]["reason"].startswith("fp16.latency.result.json is no result of mini.fp16.engine")
    assert found["bad", "int8"]["steps"] == {"upload": "done before", "build": "done", "check": "done", "bench": "done"}
    assert "done before" in capsys.readouterr().out

    assert run_fleet(boards, bundle(b"another"), tmp_path / "out") == 0
    assert set(outcomes(tmp_path / "out")["good", "int8"]["steps"].values()) == {"done"}


@needs_server
def test_a_board_that_hangs(server, boards_file, bundle, tmp_path, capsys, monkeypatch):
    """One whose command does not end, ended by the board; and one that answers nothing more."""
    monkeypatch.setattr(ssh, "KEEPALIVE_S", 0.3)
    slow = {"port": server(), "timeout_s": 2, "environment": {"FAULT": "hang"}}
    silent = {"port": server(), "environment": {"FAULT": "stop"}}
    killed = {"port": server(), "environment": {"FAULT": "kill"}}
    start = time.monotonic()
    boards = boards_file(good={"port": server()}, slow=slow, silent=silent, killed=killed)
    assert run_fleet(boards, bundle(), tmp_path / "out") == 2
    assert time.monotonic() - start < 20
    found = outcomes(tmp_path / "out")
    assert found["good", "int8"]["state"] == "ok"
    assert found["slow", "int8"]["reason"] == "build: not done after 2 s (timeout_s), so it was ended"
    assert found["killed", "int8"]["reason"] == "build: ended by the signal KILL: out of memory?"
    assert "asked to end" in (tmp_path / "out/slow/build.int8.log").read_text()
    reason = found["silent", "int8"]["reason"]
    os.kill(int(next((tmp_path / "on the boards" / "silent").glob("mini-*/server.pid")).read_text()), signal.SIGKILL)
    assert reason == "build int8: nothing more from the board: Server not responding to keepalive" + ssh.LOST


@needs_server
def test_an_interrupt_ends_what_runs_on_the_board(server, boards_file, bundle, tmp_path):
    """So that it does not disturb the next run. A server that root has logged in to refuses such a request."""
    port = server()
    boards = boards_file(slow={"port": port, "environment": {"FAULT": "hang"}})
    words = ["-m", "benchmarks.fleet", str(boards), str(bundle()), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=EXAMPLE.parents[1],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # a shell's background job ignores it
    )  # fmt: skip
    wait_for(lambda: list(tmp_path.glob("on the boards/slow/mini-*/started")))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1].splitlines()[-1] == "interrupted"
    assert process.returncode == 130
    refused = "session signalling requires privilege separation"
    wait_for(
        lambda: (
            refused in (tmp_path / f"sshd.{port}.log").read_text()
            if os.geteuid() == 0
            else list(tmp_path.glob("on the boards/slow/mini-*/ended"))
        )
    )


@needs_server
def test_only_a_known_host_and_a_known_key_will_do(server, boards_file, bundle, tmp_path, keys, home):
    port = server()
    stranger = server("other_host")
    (tmp_path / "empty").write_text("")
    (home / ".ssh" / "config").write_text("Host *\n  UserKnownHostsFile none\n  StrictHostKeyChecking no\n")
    boards = boards_file(
        changed={"port": stranger},
        unknown={"port": port, "known_hosts": str(tmp_path / "empty")},
        refused={"port": server(), "key": str(keys / "stranger")},
        locked={"port": server(), "key": str(keys / "encrypted")},
        absent={"port": free_port()},
    )
    assert run_fleet(boards, bundle(), tmp_path / "out") == 2
    reasons = {board: one["reason"] for (board, _), one in outcomes(tmp_path / "out").items()}
    assert (
        f"the host key of [127.0.0.1]:{stranger} is not the one in {tmp_path}/known_hosts.changed"
        in (reasons["changed"])
    )
    assert f"ssh-keygen -R '[127.0.0.1]:{stranger}'" in reasons["changed"]
    assert f"the host key of [127.0.0.1]:{port} is not in {tmp_path}/empty; connect once" in reasons["unknown"]
    assert "on host 127.0.0.1, none of our keys will do; put the public key into its auth" in reasons["refused"]
    assert "a key that has a passphrase goes into the agent" in reasons["locked"]
    assert reasons["absent"].startswith("no connection to 127.0.0.1: ")
    assert not (tmp_path / "on the boards").exists()


@pytest.fixture
def agent(tmp_path, keys, monkeypatch):
    """An agent that holds the key `user`."""
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    wait_for((tmp_path / "agent").exists)
    subprocess.run(["ssh-add", "-q", str(keys / "user")], check=True)
    yield
    process.terminate()
    process.wait()


@needs_server
def test_an_alias_and_an_agent(server, agent, bundle, tmp_path, keys, home):
    """A machine behind another one (ProxyJump), a key that only the agent has, and ssh's own known hosts."""
    jump, port = server(), server("other_host")
    known = f"[127.0.0.1]:{port} {(keys / 'other_host.pub').read_text()}"
    (home / ".ssh" / "known_hosts").write_text(known)
    (home / ".ssh" / "config").write_text(
        f"Host jetson\n  HostName 127.0.0.1\n  Port {port}\n  ProxyJump 127.0.0.1:{jump}\n"
    )
    boards = tmp_path / "aliases.toml"
    boards.write_text(
        f"[[board]]\nname = 'jetson'\nhost = 'jetson'\nfolder = '{tmp_path}/there'\npython = '{sys.executable}'\n"
    )
    archive = bundle()
    assert run_fleet(boards, archive, tmp_path / "out") == 2
    assert "which is a ProxyJump; connect once" in outcomes(tmp_path / "out")["jetson", "int8"]["reason"]

    (home / ".ssh" / "known_hosts").write_text(f"{known}[127.0.0.1]:{jump} {(keys / 'host.pub').read_text()}")
    assert run_fleet(boards, archive, tmp_path / "out") == 0
    for each in (jump, port):
        assert (tmp_path / f"sshd.{each}.log").read_text().count("Accepted publickey") == 1


class Proxy(threading.Thread):
    """A TCP proxy to `port` that cuts the first connection after `most` bytes from the client."""

    def __init__(self, port, most):
        super().__init__(daemon=True)
        self._target, self._most = port, most
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._target))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass_on, args=(server, client, float("inf")), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(client, server, self._most), daemon=True).start()
            self._most = float("inf")

    def _pass_on(self, source, target, most):
        passed = 0
        with contextlib.suppress(OSError):
            while passed < most:
                block = source.recv(1 << 16)
                if not block:
                    break
                target.sendall(block)
                passed += len(block)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@needs_server
def test_a_connection_cut_midway(server, boards_file, bundle, tmp_path):
    """The next run goes on from what had arrived whole."""
    proxy = Proxy(server(), 750_000)
    there = tmp_path / "on the boards" / "far"
    archive = bundle()
    boards = boards_file(far={"port": proxy.port}, near={"port": server(), "environment": {"FAULT": "cut"}})
    assert run_fleet(boards, archive, tmp_path / "out") == 2
    found = outcomes(tmp_path / "out")
    assert found["far", "int8"]["reason"].startswith("upload: ")
    assert found["near", "int8"]["reason"] == "build int8: nothing more from the board: Connection lost" + ssh.LOST
    (part,) = there.glob("mini-*")
    arrived = {path.name: path.stat().st_ino for path in part.rglob("*") if path.suffix != ".part" and path.is_file()}
    assert "0.input.npy" in arrived
    assert "run.py" not in arrived

    assert run_fleet(boards_file(far={"port": proxy.port}), archive, tmp_path / "out") == 0
    assert outcomes(tmp_path / "out")["far", "int8"]["steps"]["upload"] == "done"
    (whole,) = there.glob("mini-*")
    assert {path.name: path.stat().st_ino for path in whole.rglob("*") if path.name in arrived} == arrived
    assert not list(whole.rglob("*.part"))


@needs_server
def test_what_a_board_sends_is_not_believed(server, boards_file, bundle, tmp_path, capsys):
    archive = bundle()
    good = json.dumps(json.loads((tmp_path / "template.result.json").read_text()))
    replies = {
        "cut": good[:-9],
        "edited": good.replace("12.5", "1.5"),
        "lacking": '{"result_version": 2, "kind": "latency"}',
        "other": "[]",
        "empty": "",
    }
    boards = {
        name: {"port": server(), "environment": {"FAULT": "result", "RESULT": reply}} for name, reply in replies.items()
    }
    boards["large"] = {"port": server(), "environment": {"FAULT": "large"}}
    assert run_fleet(boards_file(**boards), archive, tmp_path / "out", "--jobs", "6") == 2
    found = outcomes(tmp_path / "out")
    for name in boards:
        assert found[name, "int8"]["reason"].startswith("int8.latency.result.json is no result of mini.int8.engine")
    assert not list((tmp_path / "out").rglob("*.result.json"))
    errors = capsys.readouterr().err
    for fault in (
        "not JSON",
        "not a JSON object",
        "result.json was edited",
        "role is missing",
        "cut: not used",
    ):
        assert fault in errors


@needs_server
def test_a_real_bundle_with_a_stand_in_of_tensorrt(server, boards_file, tmp_path):
    """Found as on a board whose TensorRT is not where Python looks: by PYTHONPATH."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    plain = write_detector(tmp_path / "student.onnx")
    quantised = write_detector(tmp_path / "student.int8.onnx", np.int8, {"model": plain})
    archive = tmp_path / "student.tar.gz"
    assert make_bundle([str(plain), str(quantised), "-o", str(archive)]) == 0
    write_module(tmp_path / "site", "10.3.0")
    variables = {"PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    board = {"port": server(), "environment": variables}
    assert run_fleet(boards_file(orin={**board, "build": ["--workspace-mib", "64"]}), archive, tmp_path / "out") == 0
    found = outcomes(tmp_path / "out")["orin", "int8"]
    sidecar = next((tmp_path / "on the boards").rglob("student.int8.engine.json"))
    assert json.loads(sidecar.read_text())["details"]["workspace_mib"] == 64
    assert found["runtime"] == "TensorRT 10.3.0"
    assert found["device"] not in (None, "")
    result = read_result(tmp_path / "out" / found["results"][0])
    assert result["role"] == "engine-int8"
    assert found["median_ms"] == result["numbers"]["summary_ms"]["total"]["median"] > 0
    assert "candidates as in ONNX Runtime" in (tmp_path / "out/orin/check.int8.log").read_text()
    assert run_fleet(boards_file(orin=board), archive, tmp_path / "out") == 0
    assert outcomes(tmp_path / "out")["orin", "int8"]["steps"]["build"] == "done"
    assert json.loads(sidecar.read_text())["details"]["workspace_mib"] is None


@pytest.fixture
def images_dir(tmp_path):
    """A data folder for the stand-in of a detector: five images in several formats and sizes, a box in each."""
    folder = tmp_path / "data"
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    images, annotations = [], []
    for index, suffix in enumerate((".png", ".jpg", ".jpg", ".bmp", ".png"), start=1):
        width, height = 80 + 16 * index, 64 + 8 * index
        pixels = np.random.default_rng(index).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        name = f"{index}{suffix}"
        cv2.imwrite(str(folder / "images" / name), cv2.resize(pixels, (width, height), interpolation=cv2.INTER_NEAREST))
        images.append({"id": 10 * index, "file_name": name, "width": width, "height": height})
        box = {"bbox": [8, 8, 40, 30], "category_id": 1 + index % 2}
        annotations.append({"id": index, "image_id": 10 * index, **box})
    categories = [{"id": number, "name": name} for number, name in zip((1, 2), CONTRACT.class_names, strict=True)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_test.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def students(tmp_path):
    """(float ONNX file, one quantised for ONNX Runtime, a bundle of both)."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    plain = write_detector(tmp_path / "student.onnx")
    quantised = write_detector(tmp_path / "student.int8.onnx", np.uint8, {"model": plain})
    archive = tmp_path / "student.tar.gz"
    assert make_bundle([str(plain), str(quantised), "-o", str(archive)]) == 0
    return plain, quantised, archive


QUICKLY = ("--runs", "10", "--fps", "100")
WITHOUT_OPENCV = "import sys\nsys.modules['cv2'] = None\n"
"""For sitecustomize.py on a board."""


@needs_server
def test_the_whole_way_on_boards_of_onnx_runtime(server, boards_file, students, images_dir, tmp_path, capsys):
    """Nothing in it is a fake: the bundle's own runner, ONNX Runtime, images, and SSH servers."""
    plain, quantised, archive = students
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(WITHOUT_OPENCV)
    here = {"port": server(), "runtime": "onnxruntime"}
    pillow = {**here, "port": server(), "environment": {"PYTHONPATH": str(tmp_path / "bare")}}
    boards = boards_file(pi={**here, "precisions": ["fp32"]}, nuc=pillow)
    words = ("--data", str(images_dir), *QUICKLY)
    assert run_fleet(boards, archive, tmp_path / "out", *words) == 0
    shown = capsys.readouterr().out
    found = outcomes(tmp_path / "out")
    local = {}
    for precision, model in (("int8", quantised), ("fp32", plain)):
        output = str(tmp_path / f"{precision}.accuracy.result.json")
        assert measure_accuracy([str(model), "--data", str(images_dir), "-o", output]) == 0
        local[precision] = read_result(output)
    for board, precision in (("pi", "fp32"), ("nuc", "int8")):
        outcome, role = found[board, precision], f"onnx-{precision}"
        steps = ("upload", "images", "check", "predict", "bench", "paced")
        assert outcome["steps"] == dict.fromkeys(steps, "done")
        assert outcome["notes"] == [] or "frames late" in outcome["notes"][0]
        assert outcome["runtime"].startswith("ONNX Runtime 1.")
        folder = tmp_path / "out" / board
        accuracy, latency, paced = (
            read_result(folder / f"{precision}.{kind}.result.json") for kind in ("accuracy", "latency", "paced")
        )
        assert accuracy["numbers"] == local[precision]["numbers"]
        assert accuracy["detections"]["sha256"] == local[precision]["detections"]["sha256"]
        assert accuracy["detections"]["count"] > 0
        assert accuracy["preparation"]["differing"] == 0
        for result in (accuracy, latency, paced):
            assert result["role"] == role
            assert result["environment"]["board"] == board
            assert result["model"]["sha256"] == sha256_of({"int8": quantised, "fp32": plain}[precision])
            assert result["data"] == local[precision]["data"]
        assert all(
            latency["numbers"]["summary_ms"][stage] for stage in ("read", "preprocess", "inference", "postprocess")
        )
        assert (latency["numbers"]["fps"], paced["numbers"]["fps"]) == (None, 100.0)
        assert latency["numbers"]["memory_mib"]["host_peak"] is not None
        assert outcome["AP"] == accuracy["numbers"]["AP"]
    assert accuracy["preparation"]["library"].startswith("Pillow")
    assert f"{100 * found['pi', 'fp32']['AP']:.1f}" in shown

    report = tmp_path / "report.html"
    results = sorted((tmp_path / "out" / "pi").glob("*.result.json"))
    assert make_report([*map(str, results), "-o", str(report), "--ship", "onnx-fp32"]) == 0
    assert "at 100 frames/s: median" in report.with_suffix(".md").read_text()

    start = time.monotonic()
    assert run_fleet(boards, archive, tmp_path / "out", *words) == 0
    assert time.monotonic() - start < 15
    steps = outcomes(tmp_path / "out")["nuc", "int8"]["steps"]
    assert {step for step, state in steps.items() if state == "done"} == {"check"}
    assert read_result(tmp_path / "out" / "nuc" / "int8.accuracy.result.json") == accuracy
    assert not list((tmp_path / "out").rglob(".earlier"))

    stored = sorted((tmp_path / "on the boards" / "pi" / "images").iterdir())
    assert len(stored) == 5
    written = {path: path.stat().st_mtime_ns for path in stored}
    assert run_fleet(boards, archive, tmp_path / "out", *words, "--images", "3") == 0
    assert outcomes(tmp_path / "out")["nuc", "int8"]["steps"]["images"] == "done before"
    assert {path: path.stat().st_mtime_ns for path in stored} == written
    assert read_result(tmp_path / "out" / "nuc" / "int8.accuracy.result.json")["data"]["images"] == 3


PYTHON = """#!/bin/sh
PYTHONPATH={site}:$PYTHONPATH exec {python} "$@"
"""
"""A Python on a board in which sitecustomize.py runs first, for the lock, too."""


@pytest.fixture
def python(tmp_path):
    """`python(name, text)` -> a Python that runs these lines before all else."""

    def make(name, text):
        site = tmp_path / f"site.{name}"
        site.mkdir()
        (site / "sitecustomize.py").write_text(text)
        path = tmp_path / f"python.{name}"
        path.write_text(PYTHON.format(site=site, python=sys.executable))
        path.chmod(0o755)
        return {"python": str(path), "runtime": "onnxruntime"}

    return make


JUMPING = """
import time
start, real = time.monotonic(), time.time
time.time = lambda: real() + 500 + (3600 if time.monotonic() - start > 2 else 0)
"""


@needs_server
def test_what_a_board_lacks_is_said_of_it_alone(server, boards_file, students, images_dir, python, tmp_path, capsys):
    """One line each, and the other boards go on. What was done before a repeated run is not done again."""
    radiance = np.full((64, 80, 3), 0.25, np.float32)
    cv2.imwrite(str(images_dir / "images" / "1.hdr"), radiance)
    annotations = images_dir / "annotations" / "instances_test.json"
    document = json.loads(annotations.read_text())
    document["images"][0].update(file_name="1.hdr", width=80, height=64)
    annotations.write_text(json.dumps(document))
    boards = boards_file(
        bare={"port": server(), **python("bare", WITHOUT_OPENCV + "sys.modules['PIL'] = None\n")},
        pillow={"port": server(), **python("pillow", WITHOUT_OPENCV)},
        old={"port": server(), **python("old", "import sys\nsys.version_info = (3, 6, 9)\n")},
        clock={"port": server(), **python("clock", JUMPING)},
    )
    words = ("--data", str(images_dir), "--images", "3", *QUICKLY)
    assert run_fleet(boards, students[2], tmp_path / "out", *words) == 2
    found = {board: one for (board, _), one in outcomes(tmp_path / "out").items()}
    assert found["bare"]["reason"].startswith(
        "images: reading images, or Pillow in its place, needs the package opencv-python-headless"
    )
    assert not (tmp_path / "on the boards" / "bare" / "images").exists()  # none was sent for nothing
    assert re.match(r"predict: 1\.hdr, here .*Pillow [\d.]+ cannot decode the image", found["pillow"]["reason"])
    assert found["old"]["reason"] == (
        "it cannot be locked: this is Python 3.6; expected 3.8 or newer: name it as `python` in boards.toml"
    )
    assert found["clock"]["state"] == "ok"
    assert found["clock"]["notes"][0] == "its clock is 8 minutes ahead, and so are its results' dates"
    assert "its clock was set by +3600 s during latency; what is timed goes by another" in found["clock"]["notes"]
    assert all("\n" not in (one["reason"] or "") for one in found.values())
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(tuple(found)) for line in lines) == 4

    image = next((tmp_path / "on the boards" / "clock" / "images").iterdir())
    image.write_bytes(bytes(image.stat().st_size))
    (tmp_path / "out" / "gone").mkdir()
    shutil.copy(tmp_path / "out" / "clock" / "int8.latency.result.json", tmp_path / "out" / "gone")
    boards = boards_file(clock={"port": server(), "python": sys.executable, "runtime": "onnxruntime"})
    assert run_fleet(boards, students[2], tmp_path / "out", *words, "--fps", "90") == 2
    (again,) = outcomes(tmp_path / "out").values()
    assert again["steps"]["predict"] == again["steps"]["bench"] == "done before"
    assert "was damaged on the board and is removed" in again["reason"]
    assert f"{tmp_path}/out/gone is of an earlier run" in capsys.readouterr().out
    assert run_fleet(boards, students[2], tmp_path / "out", *words, "--fps", "90") == 0
    (again,) = outcomes(tmp_path / "out").values()
    assert again["steps"]["images"] == again["steps"]["paced"] == "done"


@needs_server
def test_a_board_without_space(server, boards_file, tmp_path):
    (board,) = boards_from_file(boards_file(full={"port": server()}))
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 1 << 42)

    async def send():
        async with ssh.connected(board) as remote:
            await remote.send_files({"large": large, "small": Path(__file__)}, f"{tmp_path}/there/images", "images")

    with pytest.raises(
        ssh.BoardError, match=r"images: the board has \d+ MiB free, and 4194305 MiB are to be sent\. Make"
    ):
        asyncio.run(send())
    assert list((tmp_path / "there" / "images").iterdir()) == []


@needs_server
def test_a_runtime_that_the_bundle_has_nothing_for(boards_file, students, tmp_path, capsys):
    tensorrt = boards_file(orin={"port": 1, "precisions": ["int8"]})
    assert run_fleet(tensorrt, students[2], tmp_path / "out") == 2
    assert "[[board]] 'orin': --int8 needs the graph quantised for TensorRT, which is not" in capsys.readouterr().err


@needs_server
def test_two_fleets_do_not_use_a_board_at_once(server, boards_file, bundle, tmp_path):
    """The second is told who is there; where the first is killed, the board is free again."""
    port, archive = server(), bundle()
    boards = boards_file(slow={"port": port, "timeout_s": 30, "environment": {"FAULT": "hang"}})
    words = ["-m", "benchmarks.fleet", str(boards), str(archive), "-o", str(tmp_path / "first")]
    first = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL, cwd=EXAMPLE.parents[1])
    try:
        wait_for(lambda: list(tmp_path.glob("on the boards/slow/mini-*/started")))
        boards = boards_file(slow={"port": port})
        assert run_fleet(boards, archive, tmp_path / "out") == 2
        reason = outcomes(tmp_path / "out")["slow", "int8"]["reason"]
        assert re.fullmatch(
            rf"another fleet is at it \(.*@.*, process {first.pid}, since 20.*\); wait for it, and run this .* again",
            reason,
        )
    finally:
        first.kill()
        first.wait()
    wait_for(lambda: run_fleet(boards, archive, tmp_path / "out") == 0)


@needs_server
def test_a_board_without_what_the_lock_needs_says_so(server, boards_file, bundle, tmp_path):
    boards = boards_file(a={"port": server(), "python": "/nowhere/python"})
    assert run_fleet(boards, bundle(), tmp_path / "out") == 2
    reason = outcomes(tmp_path / "out")["a", "int8"]["reason"]
    assert reason.startswith("it cannot be locked: ")
    assert "/nowhere/python" in reason


@needs_server
@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e300", "Infinity", "-" + "9" * 4000, '"x"'])
def test_a_boards_absurd_number_is_told_of_that_board_alone(number, server, boards_file, bundle, tmp_path, capsys):
    text = json.dumps(sealed({"result_version": RESULT_VERSION, **provenance({}), **latency_result()}))
    absurd = text.replace('"median": 3.25', f'"median": {number}')
    assert absurd != text
    environment = {"FAULT": "result", "RESULT": absurd}
    boards = boards_file(bad={"port": server(), "environment": environment}, good={"port": server()})
    assert run_fleet(boards, bundle(), tmp_path / "out") == 2
    found = outcomes(tmp_path / "out")
    assert found["good", "int8"]["state"] == "ok"
    assert found["bad", "int8"]["reason"].startswith("int8.latency.result.json is no result of")
    shown = capsys.readouterr()
    assert max(map(len, (shown.out + shown.err).splitlines())) < 500


@needs_server
def test_a_fault_of_ours_on_one_board_does_not_end_the_others(
    server, boards_file, bundle, tmp_path, capsys, monkeypatch
):
    visit = fleet.visit

    async def visit_but_one(board, *arguments):
        if board.name == "bad":
            raise ZeroDivisionError("on purpose")
        await visit(board, *arguments)

    monkeypatch.setattr(fleet, "visit", visit_but_one)
    boards = boards_file(bad={"port": 1}, good={"port": server()})
    assert run_fleet(boards, bundle(), tmp_path / "out") == 3
    found = outcomes(tmp_path / "out")
    assert found["good", "int8"]["state"] == "ok"
    assert found["bad", "int8"]["reason"] == "a fault of this program: ZeroDivisionError: on purpose"
    assert "good" in capsys.readouterr().out


# Without a server


GOOD = "[[board]]\nname = 'a'\nhost = 'h'\n"


def test_a_bundle_that_will_not_do(bundle, tmp_path, capsys):
    boards = tmp_path / "boards.toml"
    boards.write_text(GOOD + "precisions = ['fp16', 'fp32']")
    archive = bundle()
    content = archive.read_bytes()
    archive.write_bytes(content[:-9])
    assert run_fleet(boards, archive, tmp_path / "out") == 2
    assert "cannot be read as a .tar.gz" in capsys.readouterr().err
    pack("mini", {MANIFEST: json.dumps(manifest_of(("int8",), {})).encode()}, archive)
    assert run_fleet(boards, archive, tmp_path / "out") == 2
    assert "[[board]] 'a': --fp16 needs the float graph, which is not in this bundle" in capsys.readouterr().err
    assert run_fleet(boards, archive, tmp_path / "out", "--jobs", "0") == 2
    assert "--jobs is 0; expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_a_bundle_of_the_allowed_signers_is_sent(server, boards_file, bundle, tmp_path, keys, capsys):
    boards, folder, archive = boards_file(a={"port": server()}), tmp_path / "unpacked", bundle()
    signers = tmp_path / "allowed_signers"
    signers.write_text(f"me {(keys / 'user.pub').read_text()}")
    assert run_fleet(boards, archive, tmp_path / "out", "--allowed-signers", str(signers)) == 2
    assert "mini is unsigned: nothing tells who made it; expected a signature of one of" in capsys.readouterr().err
    assert not list(tmp_path.glob("on the boards/*/*"))

    content = {path.relative_to(folder / "mini").as_posix(): path.read_bytes() for path in files(archive, folder)}
    signed = {**content, SIGNATURE: sign(content[MANIFEST], keys / "user")}
    pack("mini", signed, archive)
    assert run_fleet(boards, archive, tmp_path / "out", "--allowed-signers", str(signers)) == 0
    assert f"{archive}: signed by me with ED25519 key SHA256:" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "fleet.json").read_text())["signature"].startswith("signed by me with")

    changed = json.loads(content[MANIFEST])
    changed["files"]["run.py"]["sha256"] = hashlib.sha256(b"another").hexdigest()
    pack("mini", {**signed, "run.py": b"another", MANIFEST: json.dumps(changed).encode()}, archive)
    for words in ([], ["--allowed-signers", str(signers)]):
        assert run_fleet(boards, archive, tmp_path / "other", *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: mini was changed after it was signed")


def files(archive, folder):
    """The files of a bundle, unpacked into `folder`."""
    return [path for path in unpack(archive, folder).rglob("*") if path.is_file()]


def test_a_runner_that_was_changed_on_the_board_is_not_run(server, boards_file, bundle, tmp_path):
    boards, archive = boards_file(a={"port": server()}), bundle()
    assert run_fleet(boards, archive, tmp_path / "out") == 0
    (runner,) = (tmp_path / "on the boards" / "a").glob("mini-*/run.py")
    (runner.parent / "calls.txt").unlink()
    runner.write_text("open('ran', 'w')")
    assert run_fleet(boards, archive, tmp_path / "out") == 2
    (outcome,) = outcomes(tmp_path / "out").values()
    assert f"{runner} is not that of the bundle: it was changed on the board" in outcome["reason"]
    assert not (runner.parent / "ran").exists()


@needs_server
def test_what_is_to_roll_out_becomes_current_and_the_former_comes_back(
    server, boards_file, images_dir, tmp_path, capsys
):
    """Nothing in it is a fake: the bundles' own runner, ONNX Runtime, and SSH servers."""
    pytest.importorskip("onnxruntime")
    archives = [tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"]
    for archive, kind in zip(archives, (None, np.uint8), strict=True):
        model = write_detector(tmp_path / f"student.{archive.name[:3]}.onnx", kind)
        assert make_bundle([str(model), "-o", str(archive)]) == 0
    boards = boards_file(
        pi={"port": server(), "runtime": "onnxruntime"}, cut={"port": free_port(), "runtime": "onnxruntime"}
    )
    limits, board = tmp_path / "limits.toml", tmp_path / "on the boards" / "pi"
    words = ("--data", str(images_dir), "--images", "2", *QUICKLY, "--activate", "--limits", str(limits))

    def run(archive, most_mib):
        limits.write_text(f"max_memory_mib = {most_mib}")
        status = run_fleet(boards, archive, tmp_path / "out", *words)
        found = outcomes(tmp_path / "out")
        return status, next(outcome for (name, _), outcome in found.items() if name == "pi")

    def current():
        return os.path.realpath(board / "current" / "model.onnx").partition("student.")[2]

    status, outcome = run(archives[0], 1)
    assert (status, outcome["roll_out"], outcome["current"]) == (2, False, False)  # 2: the other board
    assert outcome["reason"].startswith("not activated: Do not roll out ONNX FP32: Peak memory is")
    assert not (board / "current").exists()
    status, outcome = run(archives[0], 100000)
    assert (status, outcome["verdict"], outcome["current"]) == (2, "Roll out", True)
    assert ", current" in capsys.readouterr().out
    assert current() == "one.onnx"
    assert run(archives[1], 100000)[1]["current"]
    assert current() == "two.onnx"
    assert fleet.main([str(boards), "--rollback"]) == 2
    out = capsys.readouterr().out
    assert "pi: the former model is current again" in out
    assert "cut: no connection to 127.0.0.1" in out
    assert current() == "one.onnx"

    limits.write_text("max_ap_drop = 1")  # for which there is no teacher
    boards = boards_file(pi={"port": server(), "runtime": "onnxruntime"})
    assert run_fleet(boards, archives[1], tmp_path / "out", *words) == 1  # a verdict, and no board failed
    assert "not activated: It cannot be told whether to roll out" in capsys.readouterr().out
    assert current() == "one.onnx"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no bundle is given; expected an archive of deploy.bundle"),
        (["x.tar.gz", "--rollback"], "--rollback is given with a bundle"),
        (["--rollback", "--fps", "10"], "--rollback is given with a bundle or options; expected the boards"),
        (["x.tar.gz", "--activate"], "expected --activate and --limits together"),
        (["x.tar.gz", "--limits", "limits.toml"], "expected --activate and --limits together"),
        (["x.tar.gz", "--activate", "--limits", "limits.toml"], "limits.toml has no limits; expected one at least"),
    ],
)
def test_flags_that_do_not_go_together(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "limits.toml").write_text("")
    assert fleet.main(["boards.toml", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["home", "limits.toml"]


@needs_server
def test_what_will_run_is_told_before_there_is_a_bundle(tmp_path, capsys):
    path = tmp_path / "boards.toml"
    pi = "[[board]]\nname = 'pi'\nhost = 'pi'\nruntime = 'onnxruntime'\n"

    def check(text, *words):
        path.write_text(text)
        return fleet.main([str(path), "none.tar.gz", *words])

    assert check(GOOD + pi, "--check", "float", "int8") == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: int8 with TensorRT",
        "pi: fp32 with ONNX Runtime; not INT8, since the bundle has the graph quantised for TensorRT",
    ]
    assert check(GOOD + pi + "precisions = ['int8']\n", "--check", "float", "int8") == 2
    assert "'pi': --int8 needs the graph quantised for ONNX Runtime, which is not" in capsys.readouterr().err
    assert check(GOOD + "build = ['--workspace-mib', 'much']\n", "--teacher", "--check", "float") == 2
    assert "'a': build, for fp16: argument --workspace-mib: invalid int" in capsys.readouterr().err


def test_without_the_package(bundle, tmp_path, capsys, monkeypatch):
    (tmp_path / "boards.toml").write_text(GOOD)
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    assert run_fleet(tmp_path / "boards.toml", bundle(), tmp_path / "out") == 2
    assert (
        "benchmarks.fleet needs the package asyncssh, which is not installed here. Do: pip install 'crosskd[fleet]'"
        in (capsys.readouterr().err)
    )

from __future__ import annotations

import json
import subprocess

from benchmarks import environment


def test_what_is_found_is_json_and_plausible():
    found = environment.read_environment()
    json.dumps(found, allow_nan=False)
    assert found["cores"] >= found["cores_usable"] >= 1
    assert found["os"]


def test_nothing_to_find_is_none(monkeypatch):
    def missing(*_args, **_keywords):
        raise OSError("not here")

    monkeypatch.setattr(environment.Path, "read_text", missing)
    monkeypatch.setattr(environment.os, "sysconf", missing)
    monkeypatch.setattr(environment.os, "getloadavg", missing)
    monkeypatch.setattr(environment.subprocess, "run", missing)
    found = environment.read_environment()
    assert [found[key] for key in ("machine", "memory_mib", "load_average", "commit", "cpu_governor")] == [None] * 5
    assert found["os"]


def test_the_commit_is_that_of_this_file(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    copy = tmp_path / "environment.py"
    copy.write_text("1")
    monkeypatch.setattr(environment, "__file__", str(copy))
    assert environment.read_environment()["commit"] is None
    git("init", "-q")
    assert environment.read_environment()["commit"] is None  # in a repository that does not hold it
    git("add", ".")
    git("commit", "-q", "-m", "x")
    assert environment.read_environment()["commit"] == git("rev-parse", "HEAD")
    copy.write_text("2")
    assert environment.read_environment()["commit"] == git("rev-parse", "HEAD") + "+changes"

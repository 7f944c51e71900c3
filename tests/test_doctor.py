"""`tuneloom doctor`: what is told of this machine, and what ends with exit 3."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import run_python
from typer.testing import CliRunner

from tuneloom.cli.main import app
from tuneloom.doctor import machine
from tuneloom.doctor.abilities import Ability, examine_abilities
from tuneloom.doctor.examine import examine
from tuneloom.doctor.hub import Hub, examine_hub
from tuneloom.doctor.machine import examine_memory, examine_place
from tuneloom.doctor.packages import examine_packages, how_to_install
from tuneloom.errors import GuardError

OFFLINE_HUB = Hub("https://hub.test", "HF_HUB_OFFLINE", None, "not asked")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *words], env={"COLUMNS": "200"})


def write_distribution(site: Path, name: str, version: str, *lines: str) -> None:
    """Write the metadata of an installed package."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    text = "".join(f"{line}\n" for line in ("Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines))
    (folder / "METADATA").write_text(text, encoding="utf-8")


# All together.


def test_a_machine_that_can_train_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("TUNELOOM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(b"x" * 2_000_000)
    monkeypatch.chdir(tmp_path)
    done = invoke("--json")
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout)
    assert told.keys() == {
        "can_train",
        "tuneloom",
        "system",
        "packages",
        "devices",
        "memory",
        "places",
        "cache_bytes",
        "hub",
        "abilities",
        "broken",
    }
    assert (told["can_train"], told["broken"], told["cache_bytes"]) == (True, [], 2_000_000)
    versions = {package["name"]: package["version"] for package in told["packages"]}
    assert versions["torch"] == metadata.version("torch")
    assert {"python", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy"} <= versions.keys()
    assert all(package["fault"] is None for package in told["packages"])
    if not torch.cuda.is_available():
        (cpu,) = told["devices"]
        assert (cpu["kind"], cpu["capability"]) == ("cpu", torch.backends.cpu.get_cpu_capability())
        assert cpu["cores"] == len(os.sched_getaffinity(0))
    assert 0 < told["memory"]["available_bytes"] <= told["memory"]["total_bytes"] <= psutil.virtual_memory().total
    assert [(place["what"], place["path"], place["fault"]) for place in told["places"]] == [
        ("runs", str(tmp_path / "runs"), None),
        ("cache", str(tmp_path / "cache"), None),
    ]
    assert told["hub"]["offline"] == "HF_HUB_OFFLINE"
    abilities = {ability["what"]: ability for ability in told["abilities"]}
    assert abilities["bf16 products"]["why"]
    assert not abilities["hub models"]["works"]
    assert all(ability["works"] or ability["mend"] for ability in abilities.values())
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"], "nothing is made"


def test_people_get_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELOOM_CACHE", str(tmp_path / "cache"))
    done = invoke("--dir", str(tmp_path / "r"))
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    for words in (
        ("memory", " GiB available of "),
        ("runs", str(tmp_path / "r"), "free, writable"),
        ("cache", str(tmp_path / "cache"), "holds 0 kB, writable"),
        ("hub", "HF_HUB_OFFLINE is set"),
        ("torch", metadata.version("torch"), "required", "ok"),
        ("bf16 products", "GFLOP/s measured"),
        ("training can work here:",),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, done.stdout)


def test_an_unusable_cache_or_folder_of_runs_ends_with_exit_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELOOM_CACHE", "/dev/null/cache")
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = invoke("--dir", str(tmp_path / "file" / "runs"), "--json")
    assert isinstance(done.exception, GuardError)
    assert done.exception.exit_code == 3
    for words in (f"runs cannot be used: {tmp_path / 'file'} is a file", "cache cannot be used", "set TUNELOOM_CACHE"):
        assert words in str(done.exception)
    told = json.loads(done.stdout)
    assert (told["can_train"], len(told["broken"])) == (False, 2)


def test_a_full_disk_is_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine_place("runs", tmp_path / "a" / "b").fault is None
    monkeypatch.setattr(machine, "MIN_FREE_BYTES", 1 << 62)
    assert "is too little" in str(examine_place("runs", tmp_path / "a" / "b").fault)


# Packages.


def test_missing_and_old_packages_are_told_with_their_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(
        tmp_path,
        "loom-test",
        "1.0",
        "Requires-Python: >=3.99",
        "Requires-Dist: loom-here>=1.5",
        "Requires-Dist: loom-old<3,>=2.0",
        "Requires-Dist: loom-missing>=1",
        "Requires-Dist: loom-elsewhere; sys_platform == 'nowhere'",
        "Requires-Dist: loom-extra>=0.4; extra == 'quant'",
        "Provides-Extra: quant",
    )
    write_distribution(tmp_path, "loom-here", "1.10+cpu")
    write_distribution(tmp_path, "loom-old", "1.9")
    monkeypatch.syspath_prepend(tmp_path)
    found = {package.name: package for package in examine_packages("loom-test")}
    assert found["loom-here"].fault is None, "1.10 is newer than 1.5, whatever its build"
    assert found["loom-old"].fault == "1.9 is not <3,>=2.0"
    assert found["loom-missing"].fault == "not installed"
    assert "is not >=3.99" in str(found["python"].fault)
    assert "loom-elsewhere" not in found
    extra = found["loom-extra"]
    assert (extra.required, extra.version, extra.fault, extra.wanted) == (False, None, None, ">=0.4")
    assert how_to_install("loom-extra", "loom-test") == "pip install 'loom-test[quant]'"
    assert how_to_install("loom-here", "loom-test") == "pip install loom-here"
    assert not [package for package in examine_packages("no-such-distribution") if package.fault]


def test_what_required_packages_need_is_required_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ("tokenizers<=0.9,>=0.8", "datasets; extra == 'all'", "loom-other")
    write_distribution(tmp_path, "loom-test", "1.0", "Requires-Dist: loom-here", "Requires-Dist: loom-there")
    write_distribution(tmp_path, "loom-here", "1", *(f"Requires-Dist: {line}" for line in needs))
    write_distribution(tmp_path, "loom-there", "1", "Requires-Dist: tokenizers>=0.7")
    write_distribution(tmp_path, "tokenizers", "0.7")
    monkeypatch.syspath_prepend(tmp_path)
    found = {package.name: package for package in examine_packages("loom-test")}
    assert (found["tokenizers"].required, found["tokenizers"].fault) == (True, "0.7 is not <=0.9,>=0.7,>=0.8")
    assert not found["datasets"].required
    assert "loom-other" not in found
    ours = {package.name: package.required for package in examine_packages()}
    assert (ours["tokenizers"], ours["huggingface-hub"], ours["wandb"]) == (True, True, False)


def test_an_old_required_package_ends_with_exit_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "peft", "0.1")
    monkeypatch.syspath_prepend(tmp_path)
    done = invoke("--dir", str(tmp_path))
    assert isinstance(done.exception, GuardError)
    assert "peft: 0.1 is not >=" in str(done.exception)
    assert "mend: pip install 'peft>=" in str(done.exception)


def test_a_torch_that_does_not_load_is_told_and_the_rest_still_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)  # what Python has for a module that cannot be imported
    findings = examine(tmp_path)
    assert findings.devices == ()
    assert [broken.what.partition(":")[0] for broken in findings.broken] == ["torch does not load"]
    abilities = {ability.what: ability for ability in findings.abilities}
    assert "torch does not load" in abilities["4bit base"].why
    assert not abilities["bf16 products"].works


def test_the_verb_runs_where_hardly_anything_else_can(tmp_path: Path) -> None:
    lost = ("torch", "numpy", "transformers", "huggingface_hub", "peft", "accelerate", "ruamel.yaml", "matplotlib")
    code = f"import sys; sys.modules.update(dict.fromkeys({lost}))\nfrom tuneloom.cli.main import main; main()"
    done = run_python("-c", code, "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "torch does not load" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["can_train"] is False


# Memory.


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n", encoding="utf-8")


def test_the_tightest_control_group_limits_the_memory(tmp_path: Path) -> None:
    mib = 1 << 20
    group(tmp_path / "a", memory__max=300 * mib, memory__current=250 * mib, memory__stat=f"anon 7\ninactive_file {100 * mib}")
    group(tmp_path / "a" / "b", memory__max="max", memory__current=mib)
    (tmp_path / "own").write_text("0::/a/b\n", encoding="utf-8")
    memory = examine_memory(tmp_path, tmp_path / "own")
    assert (memory.total_bytes, memory.limit_bytes) == (300 * mib, 300 * mib)
    assert memory.available_bytes == 150 * mib, "what only caches files can be had back"


def test_the_first_version_of_control_groups_is_read_too_and_none_is_no_limit(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("3:cpu:/x\n2:memory,hugetlb:/job\n", encoding="utf-8")
    files = {"memory__limit_in_bytes": 1 << 28, "memory__usage_in_bytes": 1 << 27}
    group(tmp_path / "memory" / "job", **files)
    group(tmp_path / "memory", memory__limit_in_bytes=(1 << 63) - 4096)
    assert examine_memory(tmp_path, tmp_path / "own").available_bytes == 1 << 27
    nothing = examine_memory(tmp_path / "none", tmp_path / "none")
    assert (nothing.limit_bytes, nothing.total_bytes) == (None, psutil.virtual_memory().total)


# The hub.


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200 if self.path == "/" else 403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield listening
        listening.shutdown()


def test_the_endpoint_that_is_set_is_asked(
    online: None, server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:secret@{address}/")
    hub = examine_hub()
    assert (hub.endpoint, hub.reachable, hub.offline) == (f"http://{address}/", True, None)
    assert "secret" not in str(hub)
    (models,) = [ability for ability in examine_abilities(hub, "not looked at") if ability.what == "hub models"]
    assert (models.works, models.mend) == (True, None)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{address}/closed")
    assert (examine_hub().reachable, examine_hub().why) == (False, "answered 403 Forbidden")


def test_a_hub_that_does_not_answer_is_not_waited_for(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        hub = examine_hub(timeout_seconds=0.2)
        assert time.monotonic() - start < 2
    assert hub.reachable is False
    assert hub.why
    assert examine_hub().reachable is False, "nobody listens there any more"


@pytest.mark.parametrize("endpoint", ["file:///etc/passwd", "hub.test", "http://[", "ftp://hub.test"])
def test_an_endpoint_that_is_no_address_is_told(endpoint: str, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert examine_hub().reachable is False
    assert "no http address" in examine_hub().why


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_means_that_nothing_is_asked(name: str, online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "True")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    hub = examine_hub()
    assert (hub.offline, hub.reachable) == (name, None)


def test_sets_of_the_hub_need_their_client_and_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub_sets(hub: Hub) -> Ability:
        return next(ability for ability in examine_abilities(hub, "not looked at") if ability.what == "hub datasets")

    offline, online = hub_sets(OFFLINE_HUB), hub_sets(Hub("https://hub.test", None, True, "answered in 0.1 s"))
    assert (offline.works, offline.mend) == (False, "unset HF_HUB_OFFLINE")
    assert (online.works, online.mend) == (True, None)
    assert re.fullmatch(r"datasets [\d.]+; https://hub.test answered in 0.1 s", online.why)
    silent = hub_sets(Hub("https://hub.test", None, False, "no answer within 3 s"))
    assert not silent.works
    assert "HF_ENDPOINT" in str(silent.mend)
    monkeypatch.setattr("tuneloom.doctor.abilities.installed_version", lambda name: None)
    assert hub_sets(OFFLINE_HUB) == Ability("hub datasets", False, "datasets is not installed", "pip install 'tuneloom[hub]'")


def test_what_is_missing_says_what_to_install() -> None:
    abilities = {ability.what: ability for ability in examine_abilities(OFFLINE_HUB, None)}
    assert list(abilities) == [
        "bf16 products",
        "4bit base",
        "8bit base",
        "parquet files",
        "hub models",
        "hub datasets",
        "ModelScope",
    ]
    for name in ("4bit base", "8bit base"):
        assert (
            abilities[name].works or abilities[name].mend == "pip install 'tuneloom[quant]'" or "fails" in abilities[name].why
        )

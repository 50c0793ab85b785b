"""The workspace of Weights & Biases, by what reaches a server on this machine."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from minimax_train.metrics.config import LoggingConfig
from minimax_train.metrics.log import MetricLog
from minimax_train.report.cli import main

# What docs/metrics.md stands for in capitals.
NAMES = {"SOURCE": "web", "LENGTH": "long", "LL": "07", "EE": "3", "GROUP": "router", "PHASE": "graph"}
SECTIONS = {
    "Loss": "tokens", "Norms": "tokens", "Routing": "tokens", "Recipe": "tokens",
    "Speed": "step", "Phases": "step", "Memory": "step", "Data": "tokens",
}  # fmt: skip
TWO_LINES = {
    "validation loss": {"validation_loss", "unigram_loss"},
    "share by source, packed and asked for": {"data_share/web", "data_share_asked/web"},
    "GPU memory of rank 0, allocated and reserved (GiB)": {"memory_gib", "reserved_memory_gib"},
    "documents cut or passed over": {"split_documents", "skipped_documents"},
}
NO_PANEL = {"tokens", "expert_load/layer_07/expert_3"}  # an axis; a line per expert


@pytest.fixture
def server():
    """One that takes what is sent to ``/graphql``; with ``refusal`` set, it refuses to save."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer = {}
            if self.path == "/graphql":
                asked = json.loads(body)
                if "upsertView" not in asked["query"]:
                    answer = {"data": {"viewer": {"id": "1", "entity": "me", "username": "me"}}}
                elif self.server.refusal:
                    answer = {"data": None, "errors": [{"message": self.server.refusal}]}
                else:
                    self.server.saved.append(asked["variables"])
                    view = {"id": "2", "name": asked["variables"]["name"]}
                    answer = {"data": {"upsertView": {"view": view, "inserted": True}}}
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.saved, made.refusal = [], None
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def _report(folder, place, server=None):
    """``minimax-report --wandb``, of a user who is logged in to the server, if there is one."""
    environment = {**os.environ, "HOME": str(folder), "WANDB_API_KEY": "", "WANDB_ERROR_REPORTING": "false"}
    if server is not None:
        environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    command = [sys.executable, "-m", "minimax_train.report.cli", "--wandb", place]
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


def _documented():
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text().partition("## Events")[0]
    names = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    return {re.sub("|".join(NAMES), lambda found: NAMES[found[0]], name) for name in names}


def test_what_is_saved(tmp_path, server):
    pytest.importorskip("wandb_workspaces")
    result = _report(tmp_path, "team/hybrid", server)
    assert result.returncode == 0, result.stderr
    (saved,) = server.saved
    assert (saved["entityName"], saved["projectName"], saved["type"]) == ("team", "hybrid", "project-view")
    name = re.fullmatch("nw-([a-z0-9]+)-v", saved["name"])[1]
    assert result.stdout == f"http://127.0.0.1:{server.server_port}/team/hybrid?nw={name}\n"

    section = json.loads(saved["spec"])["section"]
    assert section["settings"]["xAxis"] == "step"
    documented, shown = _documented(), {}
    sections = section["panelBankConfig"]["sections"]
    for given in sections:
        layout = given["flowConfig"]
        assert given["isOpen"] and len(given["panels"]) <= layout["columnsPerPage"] * layout["rowsPerPage"]
        for panel in given["panels"]:
            config = panel["config"]
            assert panel["viewType"] == "Run History Line Plot" and config["xAxis"] == SECTIONS[given["name"]]
            lines = set(config["metrics"])
            if config.get("useMetricRegex"):
                assert not lines
                # Whether W&B looks for a match anywhere in a name or of all of it, the lines are the same.
                lines, whole = (
                    {metric for metric in documented if match(config["metricRegex"], metric)}
                    for match in (re.search, re.fullmatch)
                )
                assert lines == whole
            assert lines and lines <= documented, config
            assert lines == TWO_LINES.get(config["chartTitle"], lines) and len(lines) <= 2
            assert (len(lines) == 2) == (config["chartTitle"] in TWO_LINES)
            shown |= dict.fromkeys(lines, given["name"])
    assert [given["name"] for given in sections] == list(SECTIONS)
    assert documented - shown.keys() == NO_PANEL
    expected = {"loss_by_length/long": "Loss", "weight_norm/router": "Norms", "router_entropy/layer_07": "Routing"}
    expected |= {"learning_rate": "Recipe", "mfu": "Speed", "device_seconds/graph": "Phases", "memory_gib": "Memory"}
    assert {metric: shown[metric] for metric in expected} == expected


def test_a_server_that_refuses(tmp_path, server):
    pytest.importorskip("wandb_workspaces")
    server.refusal = "permission denied"
    result = _report(tmp_path, "team/hybrid", server)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search("^error: --wandb=team/hybrid: .*permission denied$", result.stderr, re.MULTILINE)


def test_without_a_login(tmp_path):
    pytest.importorskip("wandb_workspaces")
    result = _report(tmp_path, "team/hybrid")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search("^error: --wandb=team/hybrid: .*wandb login", result.stderr, re.MULTILINE)


def test_without_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["--wandb", "team/hybrid"]) == 2
    told = "needs wandb_workspaces, which is not installed (pip install minimax_train[workspace])"
    assert capsys.readouterr().err == f"error: --wandb=team/hybrid: {told}\n"


@pytest.mark.parametrize("place", ["hybrid", "team/", "/hybrid", "https://wandb.ai/team/hybrid", ""])
def test_a_place_that_is_no_project(place, capsys):
    assert main(["--wandb", place]) == 2
    assert "must be ENTITY/PROJECT" in capsys.readouterr().err


@pytest.mark.parametrize("given", [[], ["runs/a", "--wandb", "team/hybrid"]])
def test_either_runs_or_a_workspace(given, capsys):
    with pytest.raises(SystemExit) as raised:
        main(given)
    assert raised.value.code == 2 and "either RUN... or --wandb" in capsys.readouterr().err


def test_an_evaluation_is_logged_with_the_tokens_before_it(tmp_path, monkeypatch):
    """So that W&B can draw it over tokens; also when the run goes on, or goes back."""
    rows = []
    run = types.SimpleNamespace(id="1", define_metric=lambda *a, **k: None, log=rows.append, finish=lambda **k: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: run, Error=OSError))

    def logging(first_step):
        config = LoggingConfig(wandb="offline")
        return MetricLog(config, tmp_path, {}, total_steps=9, first_step=first_step, enabled=True)

    with logging(0) as log:
        log.report(2, {"loss": 3.0, "tokens": 200})
        log.report(3, {"validation_loss": 3.5})
        log.report(4, {"loss": 2.0, "tokens": 400})
    with logging(3) as log:
        log.report(3, {"validation_loss": 3.5})
        log.report(6, {"loss": 2.0, "tokens": 600})
        log.go_back(2)
        log.report(3, {"validation_loss": 3.5})
    found = [(row["step"], row["tokens"]) for row in rows]
    assert found == [(2, 200), (3, 200), (4, 400), (3, 200), (6, 600), (3, 200)]

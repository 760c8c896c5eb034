"""A W&B server for tests, on 127.0.0.1: what wandb's core, `wandb sync` and `wandb agent` ask of one, kept in memory.

A row of the history is known by its step: one that is sent again is the same row. W&B's client counts on that (the
.syncstate beside a record holds the step at which a piece begins, "ensures that syncing a run is idempotent").
"""

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = 40 * "0"
LOGIN = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()


@dataclass
class Run:
    """What the server knows of one run."""

    told: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    received: int = 0  # rows, and those that came again
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exitcode: int | None = None
    stop: bool = False

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the history, in the order of their steps."""
        return [self.rows[step] for step in sorted(self.rows)]

    @property
    def config(self) -> dict[str, Any]:
        return {key: entry["value"] for key, entry in json.loads(self.told["config"]).items()}

    def so_far(self, name: str) -> dict[str, Any]:
        """How far the run has come, for a client that goes on with it."""
        tail, summary = json.dumps([json.dumps(row) for row in self.history[-1:]]), json.dumps(self.summary)
        counts = {"historyLineCount": len(self.rows), "eventsLineCount": 0, "logLineCount": 0}
        known = {"id": name, "name": name, "config": self.told["config"], "tags": [], "notes": "", **counts}
        begun = json.dumps({"t": 1})  # without it, a run counts as made by a sweep and not yet begun
        return {**known, "summaryMetrics": summary, "historyTail": tail, "eventsTail": "[]", "wandbConfig": begun}


class Server(ThreadingHTTPServer):
    """Runs by id; a sweep, and the commands that it has left for its agent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.runs: dict[str, Run] = {}
        self.sweep: str | None = None  # YAML
        self.commands: list[list[dict[str, Any]]] = []  # of each heartbeat; at the end: exit
        self.down = False  # it hangs up on everyone

    def handle_error(self, *args: Any) -> None:
        """A client that has gone is no error."""

    def answer(self, operation: str, v: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation. Of what is not named here, such as the flags of an organisation, nothing."""
        entity = {"id": "e", "name": v.get("entity") or v.get("entityName") or "someone"}
        project = {"id": "p", "name": v.get("project") or v.get("projectName") or "uncategorized", "entity": entity}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "someone", "username": "someone", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            run = self.runs.get(v["name"])
            return {"model": {**project, "bucket": run and run.so_far(v["name"])}}
        if operation == "UpsertBucket":
            inserted = v["name"] not in self.runs
            run = self.runs.setdefault(v["name"], Run())
            run.told |= {key: value for key, value in v.items() if value is not None}
            bucket = {"id": v["name"], "name": v["name"], "historyLineCount": len(run.rows)}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{v['run']}/{name}"} for name in v["files"]]
            return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}
        if operation == "UpsertSweep":
            self.sweep = v["config"]
            return {"upsertSweep": {"sweep": {"name": "swept", "project": project}, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            return {"project": {"sweep": {"id": "s", "name": v["sweep"], "config": self.sweep, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "a"}}}
        if operation == "Heartbeat":
            busy = any(json.loads(v["runState"]).values())
            commands = self.commands.pop(0) if self.commands and not busy else []
            commands += [{"type": "stop", "run_id": name} for name, run in self.runs.items() if run.stop and busy]
            commands += [] if busy or self.commands or commands else [{"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": "a"}, "commands": json.dumps(commands)}}
        return {}


class Handler(BaseHTTPRequestHandler):
    """GraphQL, streams of lines, and files that are put where CreateRunFiles says."""

    protocol_version = "HTTP/1.1"
    server: Server

    def parse_request(self) -> bool:
        self.close_connection = True
        return not self.server.down and super().parse_request()

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def reply(self, answer: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        _, _, run, name = self.path.split("/", 3)
        self.server.runs[run].files[name] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        data = self.body()
        if self.path.endswith("/graphql") and self.headers.get("Authorization") != LOGIN:
            self.reply({}, 401)
            return
        if self.path.endswith("/graphql"):
            asked = json.loads(data)
            operation = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            self.reply({"data": self.server.answer(operation, asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            run, sent = self.server.runs[self.path.split("/")[-2]], json.loads(data)
            files = sent.get("files") or {}
            for row in map(json.loads, files.get("wandb-history.jsonl", {}).get("content", [])):
                run.rows[row["_step"]] = row
                run.received += 1
            for summary in files.get("wandb-summary.json", {}).get("content", []):
                run.summary = json.loads(summary)
            run.exitcode = sent["exitcode"] if sent.get("complete") else None
            self.reply({"limits": {}, "stopped": run.stop})
        else:  # telemetry
            self.reply({})


@contextmanager
def serve() -> Iterator[Server]:
    """A server while the block runs."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

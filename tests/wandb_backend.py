"""A Weights & Biases server on the loopback interface, for tests: what the real client sends, kept.

It answers the part of the protocol that `wandb sync`, online runs and reports of wandb 0.31 use
(GraphQL for runs, artifacts and reports, a file stream for history, summary and exit code, plain
PUT for files) and keeps what arrives. A stream is written by line offset, as a chunk states it; a
chunk that does not start where the last one ended is listed in `unexpected`, as is anything it does
not know.

    with WandbBackend.serve() as backend:
        subprocess.run(["wandb", "sync", folder], env=os.environ | backend.environment)
    assert backend.runs["id"].history[0]["step"] == 10
"""

import gzip
import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "0123456789" * 4  # the client checks its length


@dataclass
class Run:
    """One run as the server knows it."""

    fields: dict[str, Any] = field(default_factory=dict)  # displayName, groupName, tags, ...
    lines: dict[str, list[str]] = field(default_factory=dict)  # of each streamed file
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, wandb's own entry `_wandb` included."""
        stored = json.loads(self.fields.get("config", "{}"))
        return {key: entry["value"] for key, entry in stored.items()}

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.lines.get("wandb-summary.json", ["{}"])[-1])


@dataclass
class Artifact:
    name: str
    type: str
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


@dataclass
class WandbBackend:
    """The requests that have arrived."""

    url: str = ""
    requests: int = 0
    runs: dict[str, Run] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)  # reports and workspaces
    unexpected: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point a client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY}

    @classmethod
    @contextmanager
    def serve(cls) -> Iterator["WandbBackend"]:
        backend = cls()
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, backend)) as server:
            backend.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield backend
            finally:
                server.shutdown()
                thread.join()

    # ---- the file stream ------------------------------------------------------------------------

    def stream(self, run_id: str, message: dict[str, Any]) -> None:
        run = self.runs.setdefault(run_id, Run())
        for name, chunk in (message.get("files") or {}).items():
            lines, offset = run.lines.setdefault(name, []), chunk["offset"]
            if name == "wandb-history.jsonl" and offset != len(lines):
                self.unexpected.append(f"{name} of {len(lines)} lines written at {offset}")
            lines[offset : offset + len(chunk["content"])] = chunk["content"]
        if message.get("complete"):
            run.exit_code = message["exitcode"]

    # ---- GraphQL --------------------------------------------------------------------------------

    def answer(self, operation: str, sent: dict[str, Any]) -> dict[str, Any]:
        """The `data` of the reply to one query or mutation."""
        match operation:
            case "Viewer":
                account = {"id": "u", "entity": "me", "username": "me", "email": "", "admin": False}
                return {"viewer": account | {"flags": "{}", "teams": {"edges": []}}}
            case "ServerInfo" | "ServerFeaturesQuery":
                version = {"max_cli_version": "9.9.9"}
                return {"serverInfo": {"features": [], "cliVersionInfo": version}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": None}}
            case "RunResumeStatus":
                return {"model": self._resume_status(sent["name"])}
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(sent)}
            case "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.url}/upload/run/{sent['run']}/{name}"}
                    for name in sent["files"]
                ]
                return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
            case "ArtifactType":  # is the name of a new artifact taken?
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                made = sent["input"]
                key = uuid.uuid4().hex
                self.artifacts[key] = Artifact(
                    made["artifactCollectionName"], made["artifactTypeName"]
                )
                sequence = {"id": "s", "latestArtifact": None}
                artifact = {"id": key, "state": "PENDING", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest":
                file = self._upload(sent["artifactID"], "wandb_manifest.json")
                reply = operation[0].lower() + operation[1:]
                return {reply: {"artifactManifest": {"id": "m", "file": file}}}
            case "CreateArtifactFiles":
                nodes = [
                    {"node": self._upload(spec["artifactID"], spec["name"])}
                    for spec in sent["input"]["artifactFiles"]
                ]
                return {"createArtifactFiles": {"files": {"edges": nodes}}}
            case "CommitArtifact":
                self.artifacts[sent["artifactID"]].committed = True
                return {"commitArtifact": {"artifact": {"id": sent["artifactID"], "digest": "d"}}}
            case "GetDefaultEntity":
                return {"viewer": {"id": "u", "entity": "me"}}
            case "GetProjects":
                names = dict.fromkeys(
                    [view["projectName"] for view in self.views.values()]
                    + [run.fields["project"] for run in self.runs.values()]
                )
                nodes = [self._project(name, sent["entity"]) for name in names]
                return {"models": self._page(nodes)}
            case "CreateProject":
                made = sent["input"]
                project = self._project(made["name"], made["entityName"])
                return {"upsertModel": {"project": project, "model": project, "inserted": True}}
            case "ProjectViews":
                kept = [
                    self._view(v)
                    for v in self.views.values()
                    if (v["projectName"], v["type"]) == (sent["project"], sent["viewType"])
                ]
                return {"project": {"allViews": self._page(kept)}}
            case "Runs":
                return {"project": self._listed(sent["project"], json.loads(sent["filters"]))}
            case "View":
                kept = [v for v in self.views.values() if v["name"] == sent["viewName"]]
                return {"project": {"allViews": self._page([self._view(v) for v in kept])}}
            case "SpecificReport":
                return {"view": self._view(self.views[sent["reportId"]])}
            case "upsertView" | "UpsertView2":
                key = sent.get("id") or uuid.uuid4().hex
                self.views[key] = {**sent, "id": key}
                return {"upsertView": {"view": self._view(self.views[key]), "inserted": True}}
            case _:
                self.unexpected.append(f"{operation}: {sent}")
                return {}

    def _upsert(self, sent: dict[str, Any]) -> dict[str, Any]:
        new = sent["name"] not in self.runs
        run = self.runs.setdefault(sent["name"], Run())
        run.fields.update({key: value for key, value in sent.items() if value is not None})
        return {"bucket": self._bucket(run), "inserted": new, "serverMessages": []}

    def _bucket(self, run: Run) -> dict[str, Any]:
        name = run.fields["name"]
        entity = {"id": "e", "name": run.fields.get("entity", "me")}
        return {
            "id": f"bucket-{name}",
            "name": name,
            "displayName": run.fields.get("displayName", name),
            "description": "",
            "config": run.fields.get("config", "{}"),
            "sweepName": None,
            "historyLineCount": len(run.history),
            "project": {"id": "p", "name": run.fields["project"], "entity": entity},
        }

    def _listed(self, project: str, filters: dict[str, Any]) -> dict[str, Any] | None:
        """The runs of a project in the group asked for, and those named; None if there is no
        project."""
        runs = [run for run in self.runs.values() if run.fields["project"] == project]
        if not runs:
            return None
        assert set(filters) == {"$or"}
        group, named = filters["$or"][0]["group"], filters["$or"][1]["name"]["$in"]
        found = [
            run
            for run in runs
            if run.fields.get("groupName") == group or run.fields["name"] in named
        ]
        nodes = [
            self._bucket(run)
            | {
                "state": {None: "running", 0: "finished"}.get(run.exit_code, "failed"),
                "group": run.fields.get("groupName"),
                "jobType": run.fields.get("jobType"),
                "tags": run.fields.get("tags", []),
                "summaryMetrics": json.dumps(run.summary),
                "systemMetrics": "{}",
                "user": {"name": "me", "username": "me"},
            }
            for run in found
        ]
        return {"internalId": "p", "runCount": len(nodes), "runs": self._page(nodes)}

    def _resume_status(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        bucket = self._bucket(run)
        tail = run.lines.get("wandb-history.jsonl", [])[-1:]
        bucket |= {
            "summaryMetrics": json.dumps(run.summary),
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "eventsLineCount": 0,
            "logLineCount": 0,
            "tags": run.fields.get("tags", []),
            "notes": run.fields.get("notes"),
            "wandbConfig": json.dumps({"t": 1}),
        }
        project = bucket["project"]
        return {"id": "p", "name": project["name"], "entity": project["entity"], "bucket": bucket}

    def _project(self, name: str, entity: str) -> dict[str, Any]:
        return {
            "id": "p",
            "name": name,
            "entityName": entity,
            "createdAt": "2026-01-01T00:00:00",
            "isBenchmark": False,
            "user": None,
        }

    def _view(self, view: dict[str, Any]) -> dict[str, Any]:
        kept = ("id", "name", "displayName", "description", "type", "spec")
        return {key: view.get(key) for key in kept} | {
            "project": self._project(view["projectName"], view["entityName"]),
            "user": {"username": "me", "photoUrl": "", "email": ""},
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": "2026-01-01T00:00:00",
        }

    @staticmethod
    def _page(nodes: list[dict[str, Any]]) -> dict[str, Any]:
        edges = [{"node": node, "cursor": str(at)} for at, node in enumerate(nodes)]
        return {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}

    def _upload(self, artifact_id: str, name: str) -> dict[str, Any]:
        return {
            "id": "f",
            "name": name,
            "displayName": name,
            "uploadUrl": f"{self.url}/upload/artifact/{artifact_id}/{name}",
            "uploadHeaders": [],
            "artifact": {"id": artifact_id},
            "storagePath": name,
            "uploadMultipartUrls": None,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, backend: WandbBackend, *args: Any):
        self.backend = backend
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that ends drops its idle connections
            super().handle()

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self._body()
        _, _, kind, owner, name = self.path.split("/", 4)
        backend = self.backend
        with backend.lock:
            backend.requests += 1
            target = backend.runs[owner] if kind == "run" else backend.artifacts[owner]
            target.files[name] = body
        self._reply({})

    def do_POST(self) -> None:
        body, backend = self._body(), self.backend
        with backend.lock:
            backend.requests += 1
            if self.path.endswith("/file_stream"):
                backend.stream(self.path.split("/")[-2], json.loads(body))
                return self._reply({"limits": {}})
            if self.path == "/graphql":
                call = json.loads(body)
                named = re.search(r"(?:query|mutation)\s+(\w+)", call["query"])
                assert named is not None
                return self._reply({"data": backend.answer(named[1], call.get("variables") or {})})
            if not self.path.startswith("/sdk/otel/"):  # telemetry; the server may lack it
                backend.unexpected.append(f"POST {self.path}")
            self._reply({}, 404)

    def do_GET(self) -> None:
        with self.backend.lock:
            self.backend.requests += 1
            self.backend.unexpected.append(f"GET {self.path}")
        self._reply({}, 404)

    def do_CONNECT(self) -> None:
        """A client that takes this for its proxy: refused, and remembered."""
        with self.backend.lock:
            self.backend.requests += 1
            self.backend.unexpected.append(f"CONNECT {self.path}")
        self._reply({}, 502)

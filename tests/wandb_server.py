"""As much of a W&B server as a run, `wandb sync` and an agent talk to, with a record of what it got."""

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """
    Attributes:
        runs: id -> `history` (rows), `summary`, `config`, and what the run was created with.
        artifacts: name -> what it was created with; `used`: (run, artifact), the inputs.
        sweep: the configuration of the only one; `commands`: what an agent is told, one after the other.
        queries: the GraphQL operations with their variables, in order.
        delay: seconds before each answer; `status`: the HTTP status of every answer.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: dict[str, dict] = {}
        self.artifacts: dict[str, dict] = {}
        self.used: list[tuple[str, str]] = []
        self.sweep = ""
        self.commands: list[dict] = []
        self.queries: list[tuple[str, dict]] = []
        self.delay, self.status = 0.0, 200

    def handle_error(self, request, client_address) -> None:  # wandb drops connections that it needs no more
        pass

    def run(self, name: str) -> dict:
        return self.runs.setdefault(name, {"history": [], "summary": {}, "config": {}, "done": None})

    def answer(self, query: str, v: dict) -> dict:
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        self.queries.append((operation, v))
        if operation == "UpsertBucket":
            run = self.run(v["name"])
            run.update({k: v[k] for k in ("groupName", "jobType", "tags", "displayName", "sweep") if v.get(k)})
            if v.get("config"):
                run["config"].update({k: c["value"] for k, c in json.loads(v["config"]).items()})
            project = {"id": "p", "name": v["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": v["name"], "name": v["name"], "displayName": v.get("displayName"), "project": project}
            bucket |= {"sweepName": v.get("sweep"), "historyLineCount": len(run["history"])}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "RunResumeStatus":
            run = self.runs.get(v["name"])
            if not run or "t" not in run["config"].get("_wandb", {}):
                return {"model": None}
            config = json.dumps({k: {"value": c} for k, c in run["config"].items()})
            tail = json.dumps([json.dumps(row) for row in run["history"][-1:]])
            bucket = {"id": v["name"], "name": v["name"], "config": config, "tags": run.get("tags"), "eventsTail": "[]"}
            bucket |= {"summaryMetrics": json.dumps(run["summary"]), "historyTail": tail, "logLineCount": 0}
            bucket |= {"historyLineCount": len(run["history"]), "eventsLineCount": 0, "displayName": None}
            bucket |= {"wandbConfig": json.dumps({"t": 1})}
            return {"model": {"id": "p", "name": v["project"], "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in v["files"]]
            return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":  # as if it had the content already, so that nothing is uploaded
            name = v["input"]["artifactCollectionName"]
            self.artifacts[name] = v["input"]
            sequence = {"latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": name, "state": "COMMITTED", "artifactSequence": sequence}}}
        if operation == "UpsertSweep":
            self.sweep = v["config"]
            project = {"id": "p", "name": v["projectName"], "entity": {"id": "e", "name": "me"}}
            return {"upsertSweep": {"sweep": {"name": "swp", "project": project}, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            sweep = {"id": "swp", "name": "swp", "config": self.sweep, "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            commands = []
            if not json.loads(v["runState"] or "{}"):
                commands = [self.commands.pop(0) if self.commands else {"type": "exit"}]
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if operation == "UseArtifact":
            self.used.append((v["input"]["runName"], v["input"]["artifactID"]))
            return {"useArtifact": {"artifact": {"id": v["input"]["artifactID"]}}}
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def stream(self, name: str, body: dict) -> None:
        run, files = self.run(name), body.get("files", {})
        if history := files.get("wandb-history.jsonl"):
            run["history"][history["offset"] :] = [json.loads(line) for line in history["content"]]
        if summary := files.get("wandb-summary.json"):
            run["summary"] = json.loads(summary["content"][-1])
        if body.get("complete"):
            run["done"] = body["exitcode"]
        if body.get("preempting"):
            run["preempting"] = True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        time.sleep(self.server.delay)
        answer = {}
        if self.server.status == 200 and self.path == "/graphql":
            request = json.loads(body)
            data = self.server.answer(request["query"], request.get("variables") or {})
            answer = {"data": data} if data else {"data": None, "errors": [{"message": "not on this server"}]}
        elif self.server.status == 200 and self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_GET = do_POST


@contextmanager
def serve() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
